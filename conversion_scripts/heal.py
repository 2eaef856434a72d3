"""`mosa-heal`, from a checkout: `python conversion_scripts/heal.py --help`."""

from mosa_hf.cli.heal import main

if __name__ == "__main__":
    main()
