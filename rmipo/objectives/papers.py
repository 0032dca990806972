"""Where each objective comes from: its name in print, its paper's title and arXiv number, for model cards."""

from typing import NamedTuple


class Paper(NamedTuple):
    name: str  # of the method, as its authors write it
    title: str
    arxiv: str
    authors: str  # as BibTeX takes them

    @property
    def citation(self) -> str:
        """A BibTeX entry."""
        key = self.name.lower().replace("-", "")
        return (
            f"@article{{{key},\n  title  = {{{self.title}}},\n  author = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}}\n}}"
        )


PAPERS = {
    "rmipo": Paper(
        "RMiPO",
        "Intrinsic Mutual Information as a Modulator for Preference Optimization",
        "2604.24804",
        "Liao, Peng and Zheng, Peijia and Li, Lingbo and Liang, Shangsong and Chen, Lin",
    ),
    "dpo": Paper(
        "DPO",
        "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
        "2305.18290",
        "Rafailov, Rafael and others",
    ),
    "slic": Paper(
        "SLiC-HF", "SLiC-HF: Sequence Likelihood Calibration with Human Feedback", "2305.10425", "Zhao, Yao and others"
    ),
    "ipo": Paper(
        "IPO",
        "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        "2310.12036",
        "Azar, Mohammad Gheshlaghi and others",
    ),
    "cpo": Paper(
        "CPO",
        "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
        "2401.08417",
        "Xu, Haoran and others",
    ),
    "kto": Paper(
        "KTO",
        "KTO: Model Alignment as Prospect Theoretic Optimization",
        "2402.01306",
        "Ethayarajh, Kawin and others",
    ),
    "simpo": Paper(
        "SimPO",
        "SimPO: Simple Preference Optimization with a Reference-Free Reward",
        "2405.14734",
        "Meng, Yu and Xia, Mengzhou and Chen, Danqi",
    ),
    "alpha-dpo": Paper(
        "AlphaDPO",
        "AlphaDPO: Adaptive Reward Margin for Direct Preference Optimization",
        "2410.10148",
        "Wu, Junkang and others",
    ),
    "beta-dpo": Paper(
        "beta-DPO",
        "$\\beta$-DPO: Direct Preference Optimization with Dynamic $\\beta$",
        "2407.08639",
        "Wu, Junkang and others",
    ),
    "epsilon-dpo": Paper(
        "epsilon-DPO",
        "KL Penalty Control via Perturbation for Direct Preference Optimization",
        "2502.13177",
        "Lee, Sangkyu and others",
    ),
    "simper": Paper(
        "SimPER",
        "SimPER: A Minimalist Approach to Preference Alignment without Hyperparameters",
        "2502.00883",
        "Xiao, Teng and others",
    ),
}
