"""Environment of the notebooks' kernels when pytest runs them."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# on layers this small two threads cost more than they give, many times more on a busy machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # bars of slow loads are no output of a cell,
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # nor what libraries plan
