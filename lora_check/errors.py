"""Why a check could not be made.

LoraCheckError                 exit 2; `.code` for programs, `.hint` for people
  UsageError                   the command line asks for something that cannot be
  InputError                   the user's files cannot be used
    NotFoundError              nothing lies at this location
    UnknownFormatError         no format recognises this location
    CorruptCheckpointError     header, offsets, index or pickle contradict themselves
    UnsafePickleError          a pickle that would have to run code; it was not run
    AdapterConfigError         adapter_config.json misses a key or holds an impossible value
    WrongInputError            a sound input in the wrong place: an adapter given as BASE, ...
  RegistryError                two plug-ins share a key, or a file lacks its constant

A message is one lowercase phrase: what was being read, from which file, and the offending value.
"""

from __future__ import annotations


class LoraCheckError(Exception):
    """A check that could not be made; the message names the file, `hint` says what to do."""

    code = "error"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LoraCheckError):
    """The command line, or the arguments of `check`, ask for something that cannot be."""

    code = "usage"


class InputError(LoraCheckError):
    """The user's files cannot be used."""

    code = "input"


class NotFoundError(InputError):
    """Nothing lies at this location, and the hub knows no such name."""

    code = "not-found"


class UnknownFormatError(InputError):
    """No format recognises what lies at this location."""

    code = "unknown-format"


class CorruptCheckpointError(InputError):
    """Header, offsets, index or pickle contradict themselves."""

    code = "corrupt-checkpoint"


class UnsafePickleError(InputError):
    """A pickle that would have to run code to be read; it was not run."""

    code = "unsafe-pickle"


class AdapterConfigError(InputError):
    """adapter_config.json misses a key or holds an impossible value."""

    code = "adapter-config"


class WrongInputError(InputError):
    """A sound input in the wrong place, such as an adapter given as BASE."""

    code = "wrong-input"


class RegistryError(LoraCheckError):
    """Two plug-ins share a key, or a plug-in file lacks its constant."""

    code = "registry"
