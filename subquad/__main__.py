"""`python -m subquad`, which is also what `accelerate launch -m subquad convert ...` starts."""

from subquad.cli.app import main

main()
