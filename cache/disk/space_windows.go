package disk

import (
	"os"

	"golang.org/x/sys/windows"
)

// Space tells the size of the file system that holds path, and how much of it
// a process like this one may still write, both in bytes.
func Space(path string) (total, free int64, err error) {
	p, err := windows.UTF16PtrFromString(path)
	if err != nil {
		return 0, 0, err
	}
	var avail, size, all uint64
	if err := windows.GetDiskFreeSpaceEx(p, &avail, &size, &all); err != nil {
		return 0, 0, &os.PathError{Op: "GetDiskFreeSpaceEx", Path: path, Err: err}
	}
	return int64(size), int64(avail), nil
}
