"""`mosa-evaluate`, from a checkout: `python conversion_scripts/evaluate.py --help`."""

from mosa_hf.cli.evaluate import main

if __name__ == "__main__":
    main()
