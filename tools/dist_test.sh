#!/usr/bin/env bash
# Test with several processes, which share out the images; the figures are those of one process.
#
# Usage: tools/dist_test.sh PROCESSES OPTION_FILE [arguments of `basicsr test`]
#   tools/dist_test.sh 4 options/test_ELAN_x4.yml --set path.pretrain_network_g=net_g_latest.pth
exec "$(dirname "$0")/dist_run.sh" test "$@"
