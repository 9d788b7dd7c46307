"""The library calls at their limits: what a user's model, images and settings may be like."""

import torch

import medtpp
from small_vits import BRIEF, attached, lora, normalised, state, unit

# What a training script leaves behind


def left_over(model, *, value):
    """The model with gradients of its trained parameters, as an interrupted loop leaves them."""
    for parameter in model.parameters():
        if parameter.requires_grad and value is not None:
            parameter.grad = torch.full_like(parameter, value)
    return model


def test_gradients_that_were_there_take_no_part_in_tpp():
    first, second = left_over(lora(), value=None), left_over(lora(), value=9.0)
    for model in (first, second):
        medtpp.tpp(model, normalised(), **BRIEF)
    after = state(second)
    assert all(torch.equal(value, after[name]) for name, value in state(first).items())
    gradients = [parameter.grad for parameter in second.parameters() if parameter.requires_grad]
    assert all(bool((gradient == 9).all()) for gradient in gradients)


def test_gradients_that_were_there_take_no_part_in_fine_tuning():
    first, second = left_over(attached(), value=None), left_over(attached(), value=9.0)
    held = [parameter.grad for parameter in second.parameters() if parameter.requires_grad]
    for model in (first, second):
        medtpp.finetune(model, unit(), list("ab" * 4), steps=3, batch_size=4, precision="32")
    after = state(second)
    assert all(torch.equal(value, after[name]) for name, value in state(first).items())
    assert all(bool((gradient == 9).all()) for gradient in held)
