//go:build unix

package disk

import (
	"errors"
	"os"
	"syscall"
)

// syncFolder makes the names in a folder survive a power cut, where the file system
// can do that: some on networks cannot, and say so.
func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := d.Sync(); err != nil && !errors.Is(err, syscall.EINVAL) && !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	return nil
}
