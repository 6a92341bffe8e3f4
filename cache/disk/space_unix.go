//go:build unix

package disk

import (
	"os"

	"golang.org/x/sys/unix"
)

// Space tells the size of the file system that holds path, and how much of it
// a process like this one may still write, both in bytes.
func Space(path string) (total, free int64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return int64(st.Blocks) * int64(st.Bsize), int64(st.Bavail) * int64(st.Bsize), nil
}
