"""What is not for a file: texts that are secrets, or are named like them."""

import os
import re
from collections.abc import Sequence

HIDDEN = "***"
_LONG = r"token|secret|passw(?:or)?d|passphrase|credentials?|api_?key|access_?key|private_?key"
_NAME = rf"(?:[\w.-]*(?:{_LONG})|(?:[\w.-]*[._-])?(?:key|auth))"
_SECRET_NAME = re.compile(rf"(?i)-*{_NAME}")
# hub.token=x, {token: x}, ?token=x&y, --api-key=x: what follows such a name.
_NAMED = re.compile(rf"(?i)(?<![\w.-])(-*{_NAME}['\"]?\s*[:=]\s*['\"]?)([^\s,}}&'\"]+)")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# As Hugging Face, GitHub, GitLab and AWS give them out.
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
    r"|A[KS]IA[0-9A-Z]{16})"
)
_PLAIN = re.compile(r"(?i)(?:true|false|null|none|-?[0-9]{0,6}(?:\.[0-9]+)?)")
# "The key: more data" is a sentence: the name alone, and a word of letters after the space.
_SENTENCE = re.compile(
    r"(?i)(?<![\w.-])(?:key|token|secret|auth|credential)s?: +(?!bearer|basic)[^\W\d_]{1,19}"
    r"(?=[\s.,;:!?)]|$)"
)
_SHORTEST = 12  # characters of a secret in the environment that is looked for


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return a command's words with *** for its secrets.

    These are values named like a token, key, secret, password or credential, values of environment
    variables of such names, logins in addresses, and tokens that are known by their beginning.
    Numbers and true, false and null are none.
    """
    shown: list[str] = []
    hide = False
    for word in words:
        is_name = _SECRET_NAME.fullmatch(word) is not None
        shown.append(HIDDEN if hide and not _PLAIN.fullmatch(word) else _hidden(word))
        hide = is_name and not hide
    return shown


def has_secret(text: str) -> bool:
    """Whether a text holds a login, a known token, or what `without_secrets` hides by its name.

    A sentence such as "The key: more data" does not: passwords and values with digits still do.
    """
    rest = _SENTENCE.sub("", text)
    return _hidden(rest) != rest


def _hidden(word: str) -> str:
    for secret in _of_environment():
        word = word.replace(secret, HIDDEN)
    word = _TOKEN.sub(HIDDEN, _LOGIN.sub(HIDDEN, word))
    return _NAMED.sub(
        lambda m: m[0] if _PLAIN.fullmatch(m[2]) else f"{m[1]}{HIDDEN}",
        word,
    )


def _of_environment() -> list[str]:
    """Return the values of environment variables that are named like secrets, the longest first."""
    values = [value for name, value in os.environ.items() if _SECRET_NAME.fullmatch(name)]
    secrets = [value for value in values if len(value) >= _SHORTEST and not _PLAIN.fullmatch(value)]
    return sorted(secrets, key=len, reverse=True)
