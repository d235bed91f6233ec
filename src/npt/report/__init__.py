"""What a person reads: the terminal table and the plots."""
