"""AFA-LoRA on fused expert parameters of transformers 5: each expert of a mixture has its own A and B."""

from afa_kernels.experts.layer import AFAExpertLinear, AFAExperts, ExpertBranch
from afa_kernels.experts.stack import AFAExpertStack

__all__ = ["AFAExpertLinear", "AFAExpertStack", "AFAExperts", "ExpertBranch"]
