from am_recipes.assets import base_name, fingerprint, resolve
