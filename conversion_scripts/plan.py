"""`mosa-plan`, from a checkout: `python conversion_scripts/plan.py --help`."""

from mosa_hf.cli.plan import main

if __name__ == "__main__":
    main()
