import sys

from mixer.cli import interrupts

if sys.argv[0] == "-m":  # a tool is about to be imported and run
    interrupts.leave_at_once()
