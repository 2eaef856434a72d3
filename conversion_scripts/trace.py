"""`mosa-trace`, from a checkout: `python conversion_scripts/trace.py --help`."""

from mosa_hf.cli.trace import main

if __name__ == "__main__":
    main()
