"""A bundle's language model opened for text: prompts in, pieces of text out as they are decoded.

Needs numpy, ``tokenizers`` and the runtime; ``jinja2`` only for a template that cannot be cut into
fixed turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from edgekit import host
from edgekit.bundle import Bundle, open_bundle
from edgekit.chat import Message, Turns, render
from edgekit.decode.draft import Drafter
from edgekit.decode.drafters import NAMES
from edgekit.decode.drafters import drafter as drafter_called
from edgekit.decode.generate import generate
from edgekit.decode.paying import Switch
from edgekit.decode.sampling import GREEDY, Sampling
from edgekit.decode.speculate import Tally, speculate
from edgekit.decode.stepper import Stepper
from edgekit.errors import BadInput, UnknownName, UsageError
from edgekit.exactness import Grade
from edgekit.registry import distance, language_backend
from edgekit.speculation import OFF, SpeculationPlan, plans
from edgekit.tokenizer import Tokenizer

AUTO = "auto"


@dataclass(frozen=True)
class Answer:
    """What one answer took. ``stopped`` by ``stop token``, ``limit`` or ``context``; seconds.

    ``reused`` tokens of the prompt were still in the cache. With a ``drafter``, held to ``grade``,
    ``passes`` brought the tokens behind the first, so many of each of ``widths``;
    ``drafting_seconds`` are the drafter's own, and ``plain_tokens_per_second`` is what plain
    decoding was measured to give when speculation was planned.
    """

    prompt_tokens: int
    reused: int
    tokens: int
    first_token_seconds: float
    decode_seconds: float
    stopped: str
    drafter: str = ""
    grade: Grade = "bitwise"
    passes: int = 0
    widths: Mapping[int, int] = field(default_factory=dict)
    drafting_seconds: float = 0.0
    plain_tokens_per_second: float | None = None

    @property
    def tokens_per_pass(self) -> float:
        """Of the tokens behind the first; 1 for plain decoding."""
        return (self.tokens - 1) / self.passes if self.passes else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, without the prompt; 0 where there was but one token."""
        return (self.tokens - 1) / self.decode_seconds if self.tokens > 1 else 0.0

    def to_json(self) -> dict[str, object]:
        """Every field, and the rates."""
        rates = {
            "tokens_per_second": self.tokens_per_second,
            "tokens_per_pass": self.tokens_per_pass,
        }
        return {**asdict(self), **rates}


class TextModel:
    """A language model of a bundle; a context manager, since it holds a runtime's session.

    ::

        with edgekit.TextModel("out") as model:
            for piece in model.stream("What is a tide?", chat=True, limit=100):
                print(piece, end="", flush=True)
            print(model.answer.tokens_per_second)

    Without ``artifact``: of those whose own runtime is here, the smallest. Raises ``UsageError``
    where the bundle holds no language model, ``UnknownName``, ``DamagedFile`` or
    ``MissingRuntime``.
    """

    def __init__(
        self,
        bundle: Bundle | str | Path,
        artifact: str | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        self._entry = bundle.language
        self.artifact = bundle.artifact(artifact or _fittest(bundle))
        adapter = language_backend(self.artifact.target)
        self.tokenizer = Tokenizer((bundle.folder / self._entry.tokenizer).read_text("utf-8"))
        self._template = ""
        if self._entry.template:
            self._template = (bundle.folder / self._entry.template).read_text("utf-8")
        turns = self._entry.turns
        self._turns = None if turns is None else Turns.from_json(turns)
        self._stepper: Stepper = adapter.open_decoder(self.artifact, threads=threads)
        # What they learnt is kept from text to text.
        self._drafters: dict[tuple[str, Grade], Drafter] = {}
        self._threads = threads or host.cores()
        found = plans(bundle, self.artifact.name)
        self._plans = {g: plan for g, plan in found.items() if plan.holds_here(self._threads)}
        self._seen: list[int] = []  # its first ``self._stepper.length`` lie in the cache
        self.answer: Answer | None = None

    @property
    def stepper(self) -> Stepper:
        """What decodes, for loops of your own; leave it as you found it, or rewound."""
        return self._stepper

    @property
    def stops(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        return self._entry.stops

    @property
    def context(self) -> int:
        """The most tokens of a conversation, the answer included."""
        return self._entry.context

    def __enter__(self) -> Self:
        self._stepper.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stepper.__exit__(kind, error, trace)

    def encoded(self, prompt: str | Sequence[Message], *, chat: bool = False) -> list[int]:
        """The tokens of a prompt, or of a conversation that is the model's turn next.

        Raises ``BadInput`` where it is empty, or the model has no chat template.
        """
        if isinstance(prompt, str) and not chat:
            if not prompt:
                raise BadInput("the prompt is empty; say something.")
            return self.tokenizer.encode(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not messages or not messages[-1]["content"].strip():
            raise BadInput("the prompt is empty; say something.")
        return self.tokenizer.encode(self._rendered(messages), special=False)

    def plan(self, grade: Grade = "bitwise") -> SpeculationPlan | None:
        """What ``edgekit spec plan`` found on this machine with these threads, or None."""
        return self._plans.get(grade)

    def drafter(self, name: str = AUTO, grade: Grade = "bitwise") -> str:
        """What ``name`` comes to: a drafter, or ``off``.

        ``auto`` is what was planned on this machine with these threads, and off where nothing
        was. Raises ``UnknownName``, or ``UsageError`` where the artifact does not speculate at
        that grade.
        """
        if name not in (AUTO, OFF, *NAMES):
            raise UnknownName("drafter", name, (AUTO, OFF, *NAMES))
        plan = self.plan(grade)
        if name == OFF or (name == AUTO and plan is None and grade == "bitwise"):
            return OFF
        if plan is None and grade == "numerical":
            raise UsageError(
                f"how far speculative rows of {self.artifact.name} are from plain ones was not "
                f"measured on this machine with {self._threads} threads; run edgekit spec plan "
                "--grade numerical here first."
            )
        if plan is not None and not plan.certificate.granted and name != AUTO:
            raise UsageError(
                f"speculation of {self.artifact.name} failed the {grade} certificate of edgekit "
                "spec plan on this machine; use --drafter off."
            )
        if name == AUTO:
            return OFF if plan is None else plan.chosen
        if grade == "bitwise" and not self._stepper.exact_widths:
            raise UsageError(
                f"{self.artifact.name} claims no widths whose rows are equal to the bit here, so "
                "speculation would not be lossless; use --drafter off."
            )
        return name

    def _rendered(self, messages: Sequence[Message]) -> str:
        if self._turns is not None:
            return self._turns.render(messages)
        if not self._template:
            raise BadInput("this model has no chat template; give a plain prompt, without chat.")
        return render(self._template, messages)

    def stream(
        self,
        prompt: str | Sequence[Message],
        *,
        chat: bool = False,
        limit: int = 256,
        sampling: Sampling = GREEDY,
        drafter: str = AUTO,
        grade: Grade = "bitwise",
        report: Callable[[int], None] = lambda _fed: None,
    ) -> Iterator[str]:
        """Yield the answer's text piece by piece, each whole characters; then see ``answer``.

        ``prompt`` is a text, or messages of a conversation; ``limit`` the most tokens. With
        ``grade`` ``bitwise`` a drafter changes no token; ``numerical`` allows trees, and passes
        of any width, and is for artifacts whose plan of that grade was granted. Raises
        ``BadInput`` where the prompt leaves no room in the context, and what ``drafter`` raises.
        """
        pieces = self.tokenizer.stream()
        for token in self.tokens(
            self.encoded(prompt, chat=chat),
            limit=limit,
            sampling=sampling,
            drafter=drafter,
            grade=grade,
            report=report,
        ):
            if token not in self.stops and (piece := pieces.add(token)):
                yield piece
        if rest := pieces.flush():
            yield rest

    def tokens(
        self,
        prompt: Sequence[int],
        *,
        limit: int = 256,
        sampling: Sampling = GREEDY,
        drafter: str = AUTO,
        grade: Grade = "bitwise",
        report: Callable[[int], None] = lambda _fed: None,
    ) -> Iterator[int]:
        """The same in token ids, a stop token included. What the cache still holds is reused."""
        if limit < 1:
            raise BadInput(f"the limit is {limit} tokens; it is 1 or more.")
        room = self.context - len(prompt)
        if room < 1:
            raise BadInput(
                f"the prompt has {len(prompt):,} tokens and the bundle's context is "
                f"{self.context:,}, with the answer in it; shorten the prompt, or export with a "
                "larger --context."
            )
        chosen, tally = self.drafter(drafter, grade), Tally()
        plan = self.plan(grade)
        reused = self._keep(prompt)
        self._seen = list(prompt)
        limited = min(limit, room)
        decoded = self._decoded(prompt, reused, limited, sampling, chosen, grade, tally, report)
        first, later, count = 0.0, 0.0, 0
        while True:
            start = time.perf_counter()  # what the caller does with a token is not our time
            token = next(decoded, None)
            spent = time.perf_counter() - start
            if token is None:
                return
            first, later = (first, later + spent) if count else (spent, 0.0)
            count += 1
            self._seen.append(token)
            self.answer = Answer(
                prompt_tokens=len(prompt),
                reused=reused,
                tokens=count,
                first_token_seconds=first,
                decode_seconds=later,
                stopped=self._why(token, count, limit),
                drafter=chosen if chosen != OFF else "",
                grade=grade,
                passes=tally.passes,
                widths=dict(tally.widths),
                drafting_seconds=tally.drafting_seconds,
                plain_tokens_per_second=1 / plan.single_seconds if plan else None,
            )
            yield token

    def _decoded(
        self,
        prompt: Sequence[int],
        reused: int,
        limit: int,
        sampling: Sampling,
        chosen: str,
        grade: Grade,
        tally: Tally,
        report: Callable[[int], None],
    ) -> Iterator[int]:
        """The tokens behind what the cache still holds, by the plain loop or with a drafter."""
        stepper, stops = self._stepper, self.stops
        if chosen == OFF:
            return generate(
                stepper, prompt[reused:], limit=limit, stops=stops, sampling=sampling, report=report
            )
        if (chosen, grade) not in self._drafters:
            made = drafter_called(chosen, stepper.vocabulary, trees=grade == "numerical")
            self._drafters[chosen, grade] = made
        return speculate(
            stepper,
            prompt[reused:],
            self._drafters[chosen, grade],
            limit=limit,
            stops=stops,
            sampling=sampling,
            widths=stepper.widths if grade == "numerical" else None,
            switch=self._switch(chosen, grade),
            before=prompt[:reused],
            tally=tally,
            report=report,
        )

    def _switch(self, chosen: str, grade: Grade) -> Switch | None:
        """Turns drafting off where it does not pay; needs the costs that a plan measured."""
        plan = self.plan(grade)
        candidate = plan.of(chosen) if plan else None
        return candidate.switch(plan.costs) if plan and candidate else None

    def _why(self, token: int, count: int, limit: int) -> str:
        """What ends the answer, if it ends with this token."""
        if token in self.stops:
            return "stop token"
        return "limit" if count >= limit else "context"

    def _keep(self, prompt: Sequence[int]) -> int:
        """Rewind to what the cache shares with ``prompt``, its last token always fed again."""
        shared = 0
        for old, new in zip(self._seen[: self._stepper.length], prompt[:-1], strict=False):
            if old != new:
                break
            shared += 1
        self._stepper.rewind(shared)
        return shared


def _fittest(bundle: Bundle) -> str:
    """The smallest of the artifacts that this machine is nearest to running: the fastest too,
    since to decode is to read the weights."""
    artifacts = [bundle.artifact(name) for name in bundle.artifacts]
    return min(artifacts, key=lambda each: (distance(each.target), each.model_size)).name
