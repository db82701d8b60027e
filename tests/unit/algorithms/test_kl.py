import torch

from megatron_r1.algorithms.kl import k3


def test_never_negative_and_zero_at_equality():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(1000, generator=generator).double(), torch.randn(1000, generator=generator).double()
    assert (k3(a, b) >= 0).all()
    assert k3(a, a).abs().max() == 0


def test_derivative_is_one_minus_ratio():
    logprobs = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    ref = logprobs.detach() + 0.3
    k3(logprobs, ref).sum().backward()
    assert torch.allclose(logprobs.grad, 1 - (ref - logprobs.detach()).exp())


def test_expectation_is_the_kl_divergence_and_its_gradient_that_of_the_reverse():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    log_ref = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    p = log_p.exp()
    kl = (p * (log_p - log_ref)).sum()
    expected_k3 = (p.detach() * k3(log_p, log_ref)).sum()
    assert torch.allclose(expected_k3, kl)
    (gradient,) = torch.autograd.grad(expected_k3, logits, retain_graph=True)
    assert torch.allclose(gradient, (p - log_ref.exp()).detach())
    # With the ratio in front, as on-policy sampling with a differentiated ratio would have it, it is KL(pi||ref)'s.
    ratio = (log_p - log_p.detach()).exp()
    (with_ratio,) = torch.autograd.grad((p.detach() * ratio * k3(log_p, log_ref)).sum(), logits, retain_graph=True)
    (of_kl,) = torch.autograd.grad(kl, logits)
    assert torch.allclose(with_ratio, of_kl)
