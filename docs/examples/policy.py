"""A policy for CartPole that learns again, by LoRA alone, after the motor was wired the wrong way round."""

import math
import tempfile

import torch
from torch import Tensor, nn

import qlora

CARTS, STEPS = 64, 200


def play(policy: nn.Module, motor: float) -> tuple[Tensor, Tensor]:
    """Run CARTS poles for up to STEPS steps; return log probabilities and 1 for each pole that is up.

    Both are [steps, CARTS]. The physics are those of Barto, Sutton and Anderson (1983), in steps of 20 ms.
    """
    state = torch.rand(CARTS, 4).mul_(0.1).sub_(0.05)  # position, speed, angle, angular speed
    alive, chosen, rewards = torch.ones(CARTS), [], []
    for _ in range(STEPS):
        moves = torch.distributions.Categorical(logits=policy(state), validate_args=False)
        action = moves.sample()
        chosen.append(moves.log_prob(action) * alive)
        with torch.no_grad():
            _, v, angle, spin = state.T
            force = motor * (20.0 * action - 10.0)
            push = (force + 0.05 * spin**2 * angle.sin()) / 1.1
            spin_rate = (9.8 * angle.sin() - angle.cos() * push) / (
                0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1)
            )
            speed_rate = push - 0.05 * spin_rate * angle.cos() / 1.1
            change = torch.stack([v, speed_rate, spin, spin_rate], dim=1)
            state = state + 0.02 * change
            alive = alive * (state[:, 0].abs() < 2.4) * (state[:, 2].abs() < 12 * math.pi / 180)
        rewards.append(alive)
        if not alive.any():
            break
    return torch.stack(chosen), torch.stack(rewards)


def learn(policy: nn.Module, motor: float, rounds: int, lr: float) -> None:
    """REINFORCE (Williams 1992): a move is weighted by the steps that its pole stayed up afterwards."""
    optimizer = torch.optim.Adam(qlora.trainable_parameters(policy).values(), lr=lr)
    for _ in range(rounds):
        log_probability, alive = play(policy, motor)
        if alive.sum(0).mean() > 0.95 * STEPS:
            break
        returns = alive.flip(0).cumsum(0).flip(0)
        advantage = (returns - returns.mean(1, keepdim=True)) / (returns.std() + 1e-6)
        optimizer.zero_grad()
        (-(log_probability * advantage).sum() / CARTS).backward()
        optimizer.step()


@torch.no_grad()
def score(policy: nn.Module, motor: float) -> float:
    """Return the mean number of steps that a pole stays up, at most STEPS."""
    return float(play(policy, motor)[1].sum(0).mean())


torch.manual_seed(0)
policy = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
learn(policy, motor=1.0, rounds=100, lr=1e-2)
trained, broken = score(policy, 1.0), score(policy, -1.0)

qlora.adapt(policy, qlora.LoraSpec(rank=4, alpha=8, targets="all-linear"))
learn(policy, motor=-1.0, rounds=100, lr=2e-2)
adapted = score(policy, -1.0)
numbers = sum(p.numel() for p in qlora.trainable_parameters(policy).values())
with tempfile.TemporaryDirectory() as folder:
    qlora.save_adapter(policy, folder)
qlora.merge_adapter(policy)

assert adapted > 5 * broken
assert abs(score(policy, -1.0) - adapted) < 40
print(
    f"steps upright: {trained:.0f}; {broken:.0f} with the motor reversed; {adapted:.0f} with LoRA ({numbers} numbers)"
)
