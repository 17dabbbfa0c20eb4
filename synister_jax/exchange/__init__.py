# SPDX-License-Identifier: Apache-2.0
"""Other tools' prediction files: written, read and compared."""
