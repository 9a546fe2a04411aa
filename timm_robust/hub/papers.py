"""The papers behind what this package trains and measures, as BibTeX."""
from typing import List

__all__ = ['citations']

_NOFROST = """@inproceedings{wang2022removing,
  title={Removing Batch Normalization Boosts Adversarial Training},
  author={Wang, Haotao and Zhang, Aston and Zheng, Shuai and Shi, Xingjian and Li, Mu and Wang, Zhangyang},
  booktitle={International Conference on Machine Learning},
  pages={23433--23445},
  year={2022}
}"""
_ROBUSTNORM = """@article{awais2020towards,
  title={Towards an Adversarially Robust Normalization Approach},
  author={Awais, Muhammad and Shamshad, Fahad and Bae, Sung-Ho},
  journal={arXiv preprint arXiv:2006.11007},
  year={2020}
}"""
_NF = """@inproceedings{brock2021characterizing,
  title={Characterizing signal propagation to close the performance gap in unnormalized ResNets},
  author={Brock, Andrew and De, Soham and Smith, Samuel L},
  booktitle={International Conference on Learning Representations},
  year={2021}
}"""
_MADRY = """@inproceedings{madry2018towards,
  title={Towards Deep Learning Models Resistant to Adversarial Attacks},
  author={Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  booktitle={International Conference on Learning Representations},
  year={2018}
}"""
_TRADES = """@inproceedings{zhang2019theoretically,
  title={Theoretically Principled Trade-off between Robustness and Accuracy},
  author={Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric and El Ghaoui, Laurent and Jordan, Michael},
  booktitle={International Conference on Machine Learning},
  pages={7472--7482},
  year={2019}
}"""
_FAT = """@inproceedings{zhang2020attacks,
  title={Attacks Which Do Not Kill Training Make Adversarial Learning Stronger},
  author={Zhang, Jingfeng and Xu, Xilie and Han, Bo and Niu, Gang and Cui, Lizhen and Sugiyama, Masashi and
    Kankanhalli, Mohan},
  booktitle={International Conference on Machine Learning},
  pages={11278--11287},
  year={2020}
}"""
_MBNAT = """@inproceedings{xie2020intriguing,
  title={Intriguing Properties of Adversarial Training at Scale},
  author={Xie, Cihang and Yuille, Alan},
  booktitle={International Conference on Learning Representations},
  year={2020}
}"""
_APART = """@misc{apart2022,
  title={Adversarially Perturbed Batch Normalization: A Simple Way to Improve Image Recognition},
  howpublished={\\url{https://openreview.net/forum?id=2EQzEE5seF}},
  year={2022}
}"""
_AUTOATTACK = """@inproceedings{croce2020reliable,
  title={Reliable Evaluation of Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks},
  author={Croce, Francesco and Hein, Matthias},
  booktitle={International Conference on Machine Learning},
  pages={2206--2216},
  year={2020}
}"""
_TIMM = """@misc{rw2019timm,
  author={Ross Wightman},
  title={PyTorch Image Models},
  year={2019},
  publisher={GitHub},
  journal={GitHub repository},
  doi={10.5281/zenodo.4414861},
  howpublished={\\url{https://github.com/huggingface/pytorch-image-models}}
}"""

_OF_OBJECTIVE = {
    'nofrost': [_NOFROST], 'nofrost_star': [_NOFROST], 'sat': [_MADRY], 'trades': [_TRADES], 'fat': [_FAT],
    'trades_fat': [_TRADES, _FAT], 'mbnat': [_MBNAT], 'apart': [_APART]}


def citations(model: str, objective: str, autoattack: bool) -> List[str]:
    """BibTeX entries for a model trained with an objective."""
    found = [*_OF_OBJECTIVE.get(objective, []), *([_AUTOATTACK] if autoattack else [])]
    if model.startswith('nofrost'):
        found = [_NOFROST, _NF, *found]
    if model.startswith('robustnorm'):
        found = [_ROBUSTNORM, *found]
    return list(dict.fromkeys([*found, _TIMM]))
