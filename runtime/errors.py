"""What a user can get wrong with an artifact, its machine or a request: one class a mistake."""

from __future__ import annotations

from moec.errors import InputError, MoecError


class NotAnArtifact(InputError):
    """The path is no artifact folder."""

    template = "{path} is not an artifact: {why}"


class MalformedFile(InputError):
    """A file of the artifact does not say what the format asks for."""

    template = "{file}: {problem}; the artifact is damaged, compile it again"


class MissingFile(InputError):
    """A file that the manifest lists is not there."""

    template = "{path}: {file} is missing; the artifact is incomplete, compile it again"


class UnreadableFile(InputError):
    """A file of the artifact exists but cannot be read."""

    template = "{path}: {file} cannot be read ({why})"


class UnsafePath(InputError):
    """The manifest names a file outside the artifact's folder."""

    template = "{path}: manifest.json names {file!r}, which lies outside the artifact; refused"


class WrongHash(InputError):
    """The bytes of a file differ from those that the compiler wrote."""

    template = (
        "{path}: {file} was changed after compiling (sha256 {found:.12} instead of {expected:.12}); compile it again"
    )


class OtherFormat(InputError):
    """The artifact's format version is not one that this version reads."""

    template = "{path} has artifact format {found}, this moec reads format {known}: {advice}"


class OtherArchitecture(InputError):
    """The artifact's kernels are for another kind of processor or system."""

    template = "{path} was compiled for {needed}, this machine is {have}; compile the model for this machine"


class MissingCpuFeatures(InputError):
    """The kernels use instructions that this CPU does not have."""

    template = (
        "{path} needs the CPU features {missing}, which this CPU lacks; "
        "compile the model on this machine (--target cpu)"
    )


class NotForCpu(InputError):
    """The artifact has no CPU kernels."""

    template = "{path} was compiled for {target} and has no CPU kernels; compile it with --target cpu to run it here"


class NotForGpu(InputError):
    """The artifact's kernels are for a kind of GPU that nothing here loads."""

    template = "{path} was compiled for {target}, a {kind} device: its kernels can be looked at, but not run by moec"


class NoWeights(InputError):
    """The artifact was compiled without weights."""

    template = "{path} has no weights; compile it with --weights DIR or --random-weights SEED"


class NeedsRanks(InputError):
    """The artifact is split over several processes."""

    template = (
        "{path} is split over {ranks} ranks, {started} process(es) were started: "
        "torchrun --nproc-per-node {ranks} -m moec run {path} ..."
    )


class WrongWeights(InputError):
    """A weight file is truncated, or a tensor in it is not what the plan expects."""

    template = "{file}: {problem}; the artifact is damaged, compile it again"


class NoRuntimeLibrary(MoecError):
    """TVM's runtime library is not installed or does not load."""

    template = "the TVM runtime library is not usable ({why}); install it: pip install apache-tvm"


class KernelsDoNotLoad(MoecError):
    """The kernel library does not load although its bytes are right."""

    template = "{file} does not load: {why}"


class CacheFull(MoecError):
    """No free page for another 64 tokens."""

    template = "the key-value cache is full: {pages} pages of {page_size} tokens are all in use"


class WrongTokens(InputError):
    """Token ids of a wrong type, shape or range."""

    template = "{problem}"


class EmptyPrompt(InputError):
    """A prompt without a token."""

    template = "the prompt{which} is empty: give at least one token"


class TokenOutsideVocabulary(InputError):
    """A token id that the model does not have."""

    template = "token id {token} at position {position} is outside the vocabulary of {vocab} (0 to {last})"


class PromptTooLong(InputError):
    """The prompt does not fit the compiled context."""

    template = (
        "the prompt has {tokens} tokens, the artifact was compiled for {context}; compile with --context {tokens}"
    )


class NoRoom(InputError):
    """Prompt and new tokens together do not fit the compiled context."""

    template = (
        "{tokens} prompt tokens and {new} new ones exceed the compiled context of {context}; "
        "ask for at most {room} new tokens or compile with --context {needed}"
    )


class WrongOption(InputError):
    """An option's value is out of its range."""

    template = "{option} must be {expected}, is {value}"


class TextTooShort(InputError):
    """A text of which no token can be scored."""

    template = "the text has {tokens} tokens: perplexity needs at least two"


class NoTokenizer(InputError):
    """Text was given to an artifact without a tokenizer."""

    template = "{path} has no tokenizer; {advice}"


class WrongTokenizer(InputError):
    """The tokenizer files do not load."""

    template = "{file}: {problem}"


class NoChatTemplate(InputError):
    """The tokenizer has no chat template."""

    template = "{path} has no chat template; give a plain prompt (--prompt, /v1/completions)"


class ChatTemplateFails(InputError):
    """The chat template raises an error."""

    template = "the chat template of {path} fails: {why}"


class NoRouting(InputError):
    """Recording loads of an artifact that does not tell them."""

    template = "{path}: cannot record loads: {why}"
