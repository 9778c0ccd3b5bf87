from ...unit.evaluation.conftest import icon_features, icons, inception, lpips

__all__ = ["icon_features", "icons", "inception", "lpips"]
