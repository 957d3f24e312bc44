"""README.md of a model folder: front matter for the hub, what was expanded, how to load it, what to cite."""

from collections.abc import Mapping, Sequence
from typing import Any

from statex.utils.markup import literal, table

CITATION = """\
@inproceedings{shen2026statex,
  title     = {{StateX}: Enhancing {RNN} Recall via Post-training State Expansion},
  author    = {Shen, Xingyu and Chen, Yingfa and Thai, Zhen Leng and Han, Xu and Liu, Zhiyuan and Sun, Maosong},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2026},
  pages     = {21339--21353},
  year      = {2026},
  url       = {https://aclanthology.org/2026.findings-acl.1073/},
  note      = {arXiv:2509.22630}
}"""
_INITS = {
    "reinit": "the token mixers of these layers, with their pre-norms, are re-initialised",
    "inherit": "the token mixers of these layers keep their old weights",
    "preserve": "the model computes the same function as before the expansion, and the new parameters learn from there",
}


def model_card(
    *,
    name: str,
    model_type: str,
    base_model: str | None = None,
    plans: Sequence[Mapping[str, Any]] = (),
    state: Mapping[str, Any] | None = None,
    num_parameters: int | None = None,
    training: Mapping[str, Any] | None = None,
) -> str:
    """The model card as Markdown, from plain values.

    Args:
        name: the model's title.
        model_type: of config.json, for example "statex_gla".
        base_model: hub name or path of the model it was made from.
        plans: of its expansions and re-initialisations, in order (kind, init, factor, rank, seed, layers with index,
            before, after and tensors, each edit in words: `ExpansionPlan.in_words`).
        state: `state_report(model).to_dict()`.
        num_parameters: parameters of the model.
        training: settings of its training, shown as a table; None where it was not trained since the expansion.
    """
    parts = [
        _front_matter(model_type, base_model, expanded=bool(plans)),
        f"# {literal(name)}",
        _summary(base_model, plans, state, num_parameters, training),
    ]
    if plans:
        parts += ["## What was changed"]
    for number, plan in enumerate(plans, 1):
        parts += [f"### Step {number}"] if len(plans) > 1 else []
        parts += [_plan_table(plan), _changed_tensors(plan)]
    if training:
        parts += [
            "## Training",
            table(["setting", "value"], [[literal(key), literal(_value(value))] for key, value in training.items()]),
        ]
    parts += ["## How to load it", _loading(bool(plans))]
    if plans:
        parts += ["## Citation", f"The method:\n\n```bibtex\n{CITATION}\n```"]
    return "\n\n".join(parts) + "\n"


def _front_matter(model_type: str, base_model: str | None, expanded: bool) -> str:
    from huggingface_hub import ModelCardData

    tags = ["statex", "state-expansion"] if expanded else ["statex"]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", base_model=base_model,
        tags=[*tags, "recurrent", model_type],
    )  # fmt: skip
    return f"---\n{data.to_yaml()}\n---"


def _summary(
    base_model: str | None,
    plans: Sequence[Mapping[str, Any]],
    state: Mapping[str, Any] | None,
    num_parameters: int | None,
    training: Mapping[str, Any] | None,
) -> str:
    origin = f"**{literal(base_model)}**" if base_model else "a model made from scratch"
    if not plans:
        first = f"Made from {origin}, without an expansion of its recurrent state."
    else:
        first = f"Made from {origin} by {', then by '.join(map(_deed, plans))}."
        if training is None:
            first += " It has **not been trained since**."
    sentences = [first]
    if state and state.get("total_elements"):
        before = state.get("total_elements_before") or state["total_elements"]
        sentences.append(
            f"Its recurrent state has {state['total_elements']:,} elements at batch 1 ({before:,} before), "
            f"{state['total_elements'] / before:.2f} times as many."
        )
    if num_parameters is not None:
        sentences.append(f"It has {num_parameters:,} parameters.")
    return " ".join(sentences)


def _deed(plan: Mapping[str, Any]) -> str:
    many = f"{len(plan['layers'])} layer{'s' if len(plan['layers']) != 1 else ''}"
    if plan["kind"] == "expand":
        init = literal(str(plan["init"]))
        meaning = _INITS.get(init, "an initialisation of its own")
        return f"enlarging the recurrent state of {many} {plan['factor']} times (*{init}*: {meaning})"
    return f"making the token mixers of {many} fresh **without** enlarging the state: the control of an expansion"


def _plan_table(plan: Mapping[str, Any]) -> str:
    rows = []
    for layer in plan["layers"]:
        before, after = layer["before"], layer["after"]
        counts = [_elements(before), _elements(after)]
        rows.append([str(layer["index"]), _shape(before), _shape(after), *(f"{count:,}" for count in counts)])
    titles = ["layer", "before: heads x (key dim x value dim)", "after", "state elements before", "after"]
    settings = [f"init {plan['init']}", f"factor {plan['factor']}", f"seed {plan['seed']}"]
    if plan.get("rank") is not None:
        settings.insert(2, f"rank {plan['rank']}")
    return f"{literal(', '.join(settings))}; all other layers are as they were.\n\n{table(titles, rows)}"


def _changed_tensors(plan: Mapping[str, Any]) -> str:
    rows = [
        [
            literal(edit["name"]),
            "new" if edit["before"] is None else literal(_value(edit["before"])),
            literal(_value(edit["after"])),
            literal(edit["edit"]),
        ]
        for layer in plan["layers"]
        for edit in layer.get("tensors", [])
        if edit["edit"] != "kept"
    ]
    if not rows:
        return "The plan is in `config.json` under `expansion`."
    return (
        "The plan is in `config.json` under `expansion`; it is replayed when the model is loaded.\n\n"
        f"<details><summary>{len(rows)} tensors that were changed</summary>\n\n"
        f"{table(['tensor', 'before', 'after', 'edit'], rows)}\n\n</details>"
    )


def _loading(expanded: bool) -> str:
    code = (
        "import statex  # registers the model's class\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")\n'
        'tokenizer = AutoTokenizer.from_pretrained("PATH")'
    )
    state = "\nprint(statex.state_report(model))" if expanded else ""
    return f"```python\n{code}{state}\n```"


def _shape(geometry: Mapping[str, int]) -> str:
    return f"{geometry['num_heads']} x ({geometry['key_dim']} x {geometry['value_dim']})"


def _elements(geometry: Mapping[str, int]) -> int:
    return geometry["num_heads"] * geometry["key_dim"] * geometry["value_dim"]


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return " x ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
