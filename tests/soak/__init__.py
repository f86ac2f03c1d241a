"""What a run of hours finds and a test of seconds does not: `make soak`, docs/reliability.md.

    kinds.py      the runs that are disturbed: very small models, eight steps, all kinds of stage
    trials.py     kills, signals, full disks, flipped bits ... and the comparison afterwards
    memory.py     does a long run, or a thousand answers, take more memory as it goes on?
    targets.py    the readers of other people's files, each with something to read
    hostile.py    what is read is changed at random; each reader ends in a result or in one line
    planted.py    the controls: faults that the soak must find
    records.py    records.jsonl, a line a piece of work;  page.py makes docs/reliability.md of it
    cases/        inputs that were a crash once, read by tests/test_hostile.py

Outside the test suite: pytest finds no test here. tests/test_soak.py checks the soak itself."""
