"""``python -m sparsessm_plugin.cli``."""

from sparsessm_plugin.cli import main

main()
