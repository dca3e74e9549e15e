"""The GPU battery: is the CUDA backend right, how fast is it, and what does each choice cost?

    __main__.py    sections, deadline, exit status
    report.py      numbers, checks and notes; gpu.json and gpu.md
    card.py        the device: timing, memory, profiles
    models.py      random models made on the device, datums, floating-point operations
    machine.py     0 machine, 8 tests
    correct.py     1 correct
    memory.py      2 memory, and 8B within 24 GB
    train.py       3 train, 6 larger models
    decode.py      4 decode
    baselines.py   5 baselines
    choices.py     7 choices

Nothing is downloaded: weights are random, made from a configuration with a fixed seed.
"""
