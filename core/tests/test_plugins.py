"""Plugins: found without importing, checked against the specs, blamed by name, combined as declared."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from hooktuner import hookimpl
from hooktuner.config import RunConfig
from hooktuner.context import Run
from hooktuner.discovery import Plugin, catalogue, find_plugin, installed_plugins, normal_name, plugin_from_object
from hooktuner.errors import PluginError
from hooktuner.events import Event
from hooktuner.family import Flavour, LatentSpec, ModelCard
from hooktuner.plugins import PluginSet
from hooktuner.technique import BlockInterceptor, OffloadStrategy, Regularizer

RUN = Run(config=RunConfig())
CARD = ModelCard(
    "films", "", "video", {"a": Flavour("a", "")}, "a", LatentSpec(16, 8), "x", offers=frozenset({"blocks"})
)


class Films:
    """The family of these tests."""

    @hookimpl
    def describe_model(self, run: Run) -> ModelCard:
        return CARD

    @hookimpl
    def load_model(self, run: Run, part: Any) -> Any:
        return None

    @hookimpl
    def encode_text(self, captions: Any) -> Any:
        return []

    @hookimpl
    def encode_latents(self, run: Run) -> Any:
        return {"pixels": 1}

    @hookimpl
    def predict(self, step: Any) -> Any:
        return "no tensor"


def assemble(*targets: Any) -> PluginSet:
    return PluginSet.assemble([plugin_from_object(target) for target in targets])


def refusal(*targets: Any) -> str:
    with pytest.raises(PluginError) as refused:
        assemble(*targets)
    return str(refused.value)


# --------------------------------------------------------------------------------------------------- discovery


def test_listing_imports_nothing(shelf: Any) -> None:
    shelf.add("loud", "raise SystemError('imported')", "Loud")
    shelf.family()
    assert [(plugin.name, plugin.origin) for plugin in installed_plugins()] == [
        ("films", "hooktuner-films 0.1.0"),
        ("loud", "hooktuner-loud 0.1.0"),
    ]
    assert "hooktuner_films" not in sys.modules


@pytest.mark.parametrize("typed", ["my-films", "my_films", " My-Films", "my_films_old", "MY-FILMS-OLD"])
def test_names_and_aliases_as_people_type_them(shelf: Any, typed: str) -> None:
    shelf.family("my-films")
    assert find_plugin(typed, installed_plugins()).name == "my-films"


def test_a_name_is_found_without_importing_anything(shelf: Any) -> None:
    shelf.family()
    shelf.technique()
    find_plugin("echo", installed_plugins())
    assert not {"hooktuner_films", "hooktuner_echo"} & set(sys.modules)


def test_a_broken_plugin_has_no_aliases_and_harms_nobody(shelf: Any) -> None:
    shelf.add("alpha", "import not_there", "Alpha")
    shelf.family()
    assert find_plugin("films_old", installed_plugins()).name == "films"


def test_an_unknown_name_gets_the_nearest(shelf: Any) -> None:
    shelf.family()
    shelf.technique()
    with pytest.raises(PluginError) as refused:
        find_plugin("film", installed_plugins())
    assert str(refused.value) == (
        'film — no plugin of this name is installed. Did you mean "films"? Installed: echo, films.'
    )


def test_an_unknown_name_where_nothing_is_installed(shelf: Any) -> None:
    with pytest.raises(PluginError) as refused:
        find_plugin("films", installed_plugins())
    assert str(refused.value) == "films — no plugin of this name is installed. No plugin is installed."


@pytest.mark.parametrize("typed", ["song", "Songs_Old"])
def test_a_published_name_gets_its_install_line(shelf: Any, typed: str) -> None:
    entry = {"distribution": "hooktuner-song", "kind": "family", "summary": "", "aliases": ["songs_old"]}
    shelf.catalogue({"song": entry})
    with pytest.raises(PluginError) as refused:
        find_plugin(typed, installed_plugins())
    assert str(refused.value) == f"{typed} — this plugin is not installed. Install it with: pip install hooktuner-song"


def test_two_distributions_with_one_name(shelf: Any) -> None:
    shelf.technique()
    shelf.technique(distribution="other-echo", version="2.0")
    shelf.family()
    assert find_plugin("films", installed_plugins()).name == "films"
    with pytest.raises(PluginError) as refused:
        find_plugin("echo", installed_plugins())
    assert str(refused.value) == (
        "echo — two installed distributions provide a plugin of this name: hooktuner-echo 0.1.0 and other-echo 2.0. "
        "Uninstall all but one."
    )


def test_a_broken_catalogue_costs_only_its_suggestions(shelf: Any) -> None:
    shelf.catalogue({"song": {"kind": "family"}})
    fine = {"poem": {"distribution": "hooktuner-poem", "kind": "family", "summary": "", "keys": ["poem_*"]}}
    shelf.catalogue(fine, distribution="fine-catalogue")
    notes: list[str] = []
    found = catalogue(notes)
    assert list(found) == ["poem"]
    assert found["poem"].owns("poem_length")
    assert not found["poem"].owns("poems")
    assert notes == ["The catalogue some_catalogue:ENTRIES cannot be read: KeyError: 'distribution'."]


def test_a_plugin_that_cannot_be_imported(shelf: Any) -> None:
    shelf.add("alpha", "import not_there", "Alpha", version="1.2")
    [plugin] = installed_plugins()
    with pytest.raises(PluginError) as refused:
        plugin.load()
    assert str(refused.value) == (
        "alpha (hooktuner-alpha 1.2, hooktuner_alpha:Alpha) — cannot be imported: ModuleNotFoundError: No module named "
        "'not_there'. Reinstall or update hooktuner-alpha, or run without it."
    )
    assert isinstance(refused.value.__cause__, ModuleNotFoundError)


def test_a_class_becomes_one_object_per_run(shelf: Any) -> None:
    shelf.family()
    [first], [second] = installed_plugins(), installed_plugins()
    assert first.load() is first.load()
    assert first.load() is not second.load()


def test_objects_and_classes_are_plugins() -> None:
    class MyLoudHooks:
        @hookimpl
        def on_event(self, event: Event) -> None: ...

    class Named(MyLoudHooks):
        name = "Quiet_One"

    assert plugin_from_object(MyLoudHooks).name == "my-loud-hooks"
    assert plugin_from_object(MyLoudHooks()).name == "my-loud-hooks"
    assert plugin_from_object(Named()).name == "quiet-one"
    assert normal_name(" A_b ") == "a-b"


@pytest.mark.parametrize("attribute", ["needs", "aliases"])
def test_a_string_is_no_tuple_of_names(attribute: str) -> None:
    target = type("Odd", (Films,), {attribute: "blocks"})
    with pytest.raises(PluginError, match=f"`{attribute}` must be a tuple of names, not 'blocks'"):
        getattr(plugin_from_object(target), attribute)


# -------------------------------------------------------------------------------------------- hooks as declared


def test_a_misspelt_hook() -> None:
    class Odd:
        @hookimpl
        def on_evnt(self, event: Event) -> None: ...

    assert refusal(Films, Odd) == (
        f"odd ({__name__} (object)) — there is no hook 'on_evnt'. Did you mean \"on_event\"? "
        "See `docs/hooks.md` for all hooks of API 1."
    )


def test_a_hook_without_its_mark() -> None:
    class Odd:
        @hookimpl
        def on_event(self, event: Event) -> None: ...

        def prepare_input(self, run: Run, step: Any, predict: Any) -> None: ...

    assert refusal(Films, Odd) == (
        f"odd ({__name__} (object)) — its prepare_input() is named like the hook prepare_input but would never be "
        "called. Put @hooktuner.hookimpl above it, or give it another name."
    )


def test_a_plugin_without_hooks() -> None:
    class Odd:
        pass

    assert refusal(Films, Odd).endswith(
        "answers no hook. Put @hooktuner.hookimpl above the methods that answer hooks; `docs/hooks.md` lists them."
    )


def test_an_argument_that_the_hook_does_not_have() -> None:
    class Odd:
        @hookimpl
        def on_event(self, runn: Run) -> None: ...

    assert refusal(Films, Odd) == (
        f"odd ({__name__} (object)) — hook on_event has no argument 'runn'. Did you mean \"run\"? "
        "It receives (run, event)."
    )


@pytest.mark.parametrize("form", ["run=None", "*, run", "*run", "**run"])
def test_arguments_that_pluggy_would_not_fill(form: str) -> None:
    space: dict[str, Any] = {"hookimpl": hookimpl}
    exec(f"class Odd:\n    @hookimpl\n    def on_event(self, {form}): ...", space)
    assert "pluggy would not fill it. Use plain parameters among (run, event)." in refusal(Films, space["Odd"])


@pytest.mark.parametrize("option", ["tryfirst", "trylast", "wrapper", "hookwrapper"])
def test_nobody_jumps_the_queue(option: str) -> None:
    class Odd:
        @hookimpl(**{option: True})
        def on_event(self, event: Event) -> Any:
            yield

    assert "hook on_event: tryfirst, trylast and wrappers are not allowed." in refusal(Films, Odd)


def test_static_methods_and_other_names_count() -> None:
    seen: list[Event] = []

    class Odd:
        @staticmethod
        @hookimpl(specname="on_event")
        def listen(event: Event) -> None:
            seen.append(event)

    plugins = assemble(Films, Odd)
    plugins.on_event(RUN, Event())
    assert seen == [Event()]


# ------------------------------------------------------------------------------------------------------ claims


def test_a_run_needs_a_family() -> None:
    class Odd:
        @hookimpl
        def on_event(self, event: Event) -> None: ...

    assert refusal(Odd) == (
        'model_family — no model family is active. Set "model_family" in the config or name one with --plugin; '
        "`tuner plugins` lists those that are installed."
    )


def test_two_families_are_both_named() -> None:
    class Songs(Films):
        pass

    where = f"{__name__} (object)"
    assert refusal(Films, Songs) == (
        f"model_family — a run has one model family, and two are wanted: films ({where}) and songs ({where}). "
        "Remove one."
    )


def test_a_family_without_a_required_hook() -> None:
    class Half:
        @hookimpl
        def describe_model(self, run: Run) -> ModelCard:
            return CARD

    assert refusal(Half) == f"half ({__name__} (object)) — a model family must implement the hook load_model."


def test_a_technique_cannot_take_a_slot() -> None:
    class Odd:
        @hookimpl
        def predict(self, step: Any) -> Any: ...

    assert refusal(Films, Odd) == (
        f"odd ({__name__} (object)) — hook predict belongs to the model family, and films ({__name__} (object)) fills "
        "it. A technique cannot implement it."
    )


def test_only_one_plugin_may_place_weights() -> None:
    class One:
        @hookimpl
        def offload_strategy(self, model: Any) -> Any: ...

    class Two(One):
        pass

    where = f"{__name__} (object)"
    assert refusal(Films, One, Two) == (
        f"offload_strategy — only one plugin may answer this hook, and one ({where}) and two ({where}) both do. "
        "Remove one."
    )


def test_two_plugins_of_one_name() -> None:
    assert refusal(Films(), Films()) == "films — two plugins of this name are wanted. Give one another name."


def test_needs_that_the_family_does_not_offer() -> None:
    class Odd:
        needs = ("frames", "blocks", "audio")

        @hookimpl
        def on_event(self, event: Event) -> None: ...

    where = f"{__name__} (object)"
    with pytest.raises(PluginError) as refused:
        assemble(Films, Odd).check_needs(CARD)
    assert str(refused.value) == (
        f"odd ({where}) — needs audio, frames of a model, and films ({where}) does not offer that (it offers blocks). "
        "Train without odd."
    )


# ------------------------------------------------------------------------------------------------------- calls


class Recorder:
    seen: list[str]

    def __init__(self, name: str, seen: list[str]) -> None:
        self.name, self.seen = name, seen

    @hookimpl
    def on_event(self) -> None:
        self.seen.append(self.name)


def test_the_family_first_then_as_the_user_wrote() -> None:
    seen: list[str] = []

    class Heard(Films):
        @hookimpl
        def on_event(self) -> None:
            seen.append("family")

    plugins = assemble(Recorder("zebra", seen), Heard, Recorder("ant", seen))
    plugins.on_event(RUN, Event())
    assert seen == ["family", "zebra", "ant"]
    assert list(plugins.lock()) == ["heard", "zebra", "ant"]
    assert plugins.lock()["ant"] == {"distribution": __name__, "version": "(object)"}


def test_a_closed_set_calls_nobody_and_closes_again() -> None:
    seen: list[str] = []
    plugins = assemble(Films, Recorder("ant", seen))
    plugins.close()
    plugins.close()
    plugins.on_event(RUN, Event())
    assert seen == []


def test_an_exception_is_blamed_and_keeps_its_traceback() -> None:
    class Odd:
        @hookimpl
        def on_event(self, event: Event) -> None:
            raise KeyError("inside")

    with pytest.raises(KeyError) as raised:
        assemble(Films, Odd).on_event(RUN, Event())
    assert raised.value.__notes__ == [f"raised by plugin odd ({__name__} (object)) in hook on_event"]
    assert raised.traceback[-1].name == "on_event"


@pytest.mark.parametrize(
    ("call", "answer", "wanted"),
    [
        (lambda plugins: plugins.load_model(RUN, type("P", (), {"value": "vae"})), "NoneType", "the part 'vae'"),
        (lambda plugins: plugins.encode_text(RUN, None, ["a"]), "list", "a sequence of 1 mappings, one per caption"),
        (lambda plugins: plugins.encode_latents(RUN, None, None), "dict", 'a mapping with "latents"'),
    ],
)
def test_an_answer_of_another_type(call: Any, answer: str, wanted: str) -> None:
    with pytest.raises(PluginError) as refused:
        call(assemble(Films))
    assert f"answered {answer}; it must return {wanted}. This is a mistake in the plugin" in str(refused.value)


@pytest.mark.parametrize("hook", ["regularizer", "intercept_blocks", "offload_strategy"])
def test_techniques_answer_with_the_right_things(hook: str) -> None:
    odd = type("Odd", (), {hook: hookimpl(lambda self, model: "nonsense")})
    getattr(odd, hook).__name__ = hook
    with pytest.raises(PluginError, match=f"hook {hook} answered str; it must return"):
        getattr(assemble(Films, odd), hook)(RUN, None)


def test_interceptors_nest_by_stage_then_by_order() -> None:
    def technique(name: str, stage: str) -> Any:
        interceptor = type("Interceptor", (BlockInterceptor,), {"stage": stage})()
        plugin = type("T", (), {"name": name, "intercept_blocks": hookimpl(lambda self, model: interceptor)})
        return plugin()

    wanted = [technique("a", "reside"), technique("b", "observe"), technique("c", "route"), technique("d", "observe")]
    named = [name for name, _ in assemble(*wanted, Films).intercept_blocks(RUN, None)]  # type: ignore[arg-type]
    assert named == ["c", "b", "d", "a"]


def test_unions_keep_answers_under_their_owners() -> None:
    class One:
        @hookimpl
        def regularizer(self, model: Any) -> Regularizer:
            return Regularizer()

        @hookimpl
        def encode_features(self, clip: Any) -> Any:
            return {"x": 1}

    class Two(One):
        pass

    plugins = assemble(Films, Two, One)
    assert list(plugins.regularizer(RUN, None)) == ["two", "one"]  # type: ignore[arg-type]
    assert plugins.encode_features(RUN, None) == {"two/x": 1, "one/x": 1}  # type: ignore[arg-type]


def test_core_decides_where_nobody_answers() -> None:
    plugins = assemble(Films)
    assert plugins.offload_strategy(RUN, None) is None  # type: ignore[arg-type]
    assert plugins.compute_loss(RUN, None) is None  # type: ignore[arg-type]
    assert not plugins.has("offload_strategy")
    assert plugins.owner("offload_strategy") is None
    assert plugins.owner("predict") == "films"

    class One:
        @hookimpl
        def offload_strategy(self, model: Any) -> OffloadStrategy:
            return OffloadStrategy()

    assert isinstance(assemble(Films, One).offload_strategy(RUN, None), OffloadStrategy)  # type: ignore[arg-type]


def test_options_must_be_a_model() -> None:
    class Odd:
        @hookimpl
        def options(self) -> Any:
            return dict

    with pytest.raises(PluginError, match=r"answered type; it must return a subclass of hooktuner\.PluginOptions"):
        plugin_from_object(Odd).option_model()


def test_origin_of_installed_plugins() -> None:
    assert Plugin("a", "hooktuner-a", "1.0").origin == "hooktuner-a 1.0"
