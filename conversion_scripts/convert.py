"""`mosa-convert`, from a checkout: `python conversion_scripts/convert.py --help`."""

from mosa_hf.cli.convert import main

if __name__ == "__main__":
    main()
