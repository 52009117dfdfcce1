"""Weights & Biases without surprises."""

import os

from requests.utils import get_netrc_auth


def offline_without_account() -> None:
    """Let W&B write to disk where nobody is logged in, instead of asking for an account in the middle of a run.

    `wandb sync` sends such runs later. What the user set in `WANDB_MODE` stays.
    """
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not (os.environ.get("WANDB_API_KEY") or get_netrc_auth(host)):
        os.environ.setdefault("WANDB_MODE", "offline")
