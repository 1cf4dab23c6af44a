"""`python -m align`, and `accelerate launch -m align` for several processes."""

from .cli import main

main()
