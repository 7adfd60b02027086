"""Other people's training loops. Nothing here is imported by ``import kasmina_ext``; each module needs an extra:
``pip install kasmina_ext[transformers]``, ``kasmina_ext[lightning]``.
"""
