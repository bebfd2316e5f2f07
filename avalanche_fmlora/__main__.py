"""`python -m avalanche_fmlora` is `fmlora`."""

from avalanche_fmlora.cli import main

main(prog_name="python -m avalanche_fmlora")
