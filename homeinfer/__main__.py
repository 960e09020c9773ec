"""`python -m homeinfer`."""

from homeinfer.cli.main import main

main()
