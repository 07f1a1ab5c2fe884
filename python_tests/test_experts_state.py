"""Models with branches on their experts: copies, pickles and state dicts."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from expert_models import fill, mixture, tokens
from helpers import run_python
from test_experts import experts_of, injected

import afa_kernels as afa


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_can_be_copied_and_pickled(copied):
    model, ids = injected(), tokens()
    afa.set_alpha_t(model, 0.25)
    other = copied(model)
    assert torch.equal(other(ids).logits, model(ids).logits)
    afa.set_alpha_t(other, 0.0)
    afa.merge(other)
    assert experts_of(other).afa["down_proj"].merged and not experts_of(model).afa["down_proj"].merged


def test_another_process_loads_a_saved_model(tmp_path):
    model, ids = injected(), tokens()
    torch.save((model, ids, model(ids).logits.detach()), tmp_path / "model.pt")
    run_python(
        f"import torch; model, ids, want = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "torch.testing.assert_close(model(ids).logits.detach(), want)"
    )


def test_state_dicts():
    model, ids = injected(), tokens()
    afa.set_alpha_t(model, 0.25)
    other = injected()
    fill(other, seed=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids).logits, model(ids).logits) and experts_of(other).afa["down_proj"].alpha_t == 0.25
    afa.set_alpha_t(model, 0.0)
    want = model(ids).logits
    afa.merge(model)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(ids).logits, want)
    assert experts_of(other).afa["down_proj"].merged


def test_branches_alone_are_not_loaded_into_merged_experts_nor_merged_ones_into_others():
    model = injected()
    afa.set_alpha_t(model, 0.0)
    plain = model.state_dict()
    merged = afa.merge(copy.deepcopy(model)).state_dict()
    for into_merged, state in ((True, plain), (False, merged)):
        other = copy.deepcopy(model)
        if into_merged:
            afa.merge(other)
        before, ids = copy.deepcopy(other.state_dict()), tokens()
        want = other(ids).logits
        of_branches = {name: torch.zeros_like(t) for name, t in state.items() if ".afa." in name}
        for module, prefix in ((other, ""), (experts_of(other).afa, "model.layers.1.mlp.experts.afa.")):
            part = {name.removeprefix(prefix): t for name, t in of_branches.items() if name.startswith(prefix)}
            with pytest.raises(RuntimeError, match="a branch of a merged layer cannot be loaded without its weight"):
                module.load_state_dict(part, strict=False)
        assert other.state_dict().keys() == before.keys() and torch.equal(other(ids).logits, want)
        other.load_state_dict(state)
        assert experts_of(other).afa["down_proj"].merged != into_merged
    unloaded = afa.unload(other)
    unloaded.load_state_dict(mixture().state_dict())
    assert not any(m._load_state_dict_pre_hooks for m in unloaded.modules())


def test_a_state_that_does_not_fit_leaves_experts_unmerged():
    model, narrow = injected(), injected(r=2)
    for each in (model, narrow):
        afa.set_alpha_t(each, 0.0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(afa.merge(narrow).state_dict())
    assert not experts_of(model).afa["down_proj"].merged
