package e2e

import (
	"os"
	"syscall"
)

// maxRSS is the most memory that a process that has ended had, in MiB.
func maxRSS(s *os.ProcessState) float64 {
	usage, ok := s.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0
	}
	return float64(usage.Maxrss) / 1024
}
