"""The fault campaign: seeded trials that attack the command line, and one oracle that judges them all.

    scripts/fault_campaign --help

Modules: `syscalls` stops a process at its system calls; `runs` starts commands and drives them through what `directors`
have in store; `world` is the folder a trial happens in; `oracle` judges what is left; `sources` makes checkpoints; the others
are kinds of trials. Nothing here imports torch: a run is a fork of a process that has the command line loaded.
"""
