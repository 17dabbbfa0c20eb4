# SPDX-License-Identifier: Apache-2.0
"""What every room uses: errors, progress, flags, files, SQL and pictures."""
