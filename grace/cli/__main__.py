"""`python -m grace.cli`, the same as `grace`."""

from grace.cli import main

if __name__ == "__main__":
    main()
