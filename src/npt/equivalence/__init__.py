"""Phase 1, equivalence pre-training: closed-form calibration, objectives, teacher targets, trainer."""
