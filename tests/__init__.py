import logging

# At every import it warns that an optional package is missing; the command leaves that out too.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
