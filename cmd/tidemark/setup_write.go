package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A plan is what one client needs: files, and what to do when they are there.
type plan struct {
	files []file
	// check looks for what somebody else has set up in a way that the plan would
	// not work, or would undo. It may be nil.
	check func(machine) []error
	steps []string // commands that have the client read the files
	notes []string // paragraphs
}

// A file is one of a client's files.
type file struct {
	path  string // as the client knows it
	mode  fs.FileMode
	intro string // what to do with text, for somebody who does it by hand
	text  string
	// edit makes what the file must be of what it is, nil if there is none. It
	// returns what it was given if nothing is missing, and keeps what it does not
	// know as it is.
	edit func(old []byte) ([]byte, error)
}

// print shows the plan to somebody who carries it out.
func (p *plan) print(w io.Writer) {
	between := ""
	for _, f := range p.files {
		if f.intro == "" {
			continue
		}
		fmt.Fprintf(w, "%s%s\n", between, wrap(f.intro))
		if f.text != "" {
			fmt.Fprintf(w, "\n%s", indent(f.text))
		}
		between = "\n"
	}
	p.printRest(w)
}

func (p *plan) printRest(w io.Writer) {
	if len(p.steps) > 0 {
		fmt.Fprintf(w, "\nThen:\n\n%s", indent(strings.Join(p.steps, "\n")))
	}
	for _, n := range p.notes {
		fmt.Fprintf(w, "\n%s\n", wrap(n))
	}
}

// wrap breaks long lines between words, but for those that are indented.
func wrap(text string) string {
	const width = 88
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, " ") {
			b.WriteString(line)
			continue
		}
		column := 0
		for _, word := range strings.Fields(line) {
			switch {
			case column == 0:
			case column+len(word) < width:
				b.WriteByte(' ')
				column++
			default:
				b.WriteByte('\n')
				column = 0
			}
			b.WriteString(word)
			column += len(word)
		}
		if strings.HasSuffix(line, "\n") {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// indent sets text apart from what is said about it.
func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.TrimSuffix(text, "\n") + "\n") {
		if line != "\n" {
			b.WriteString("  ")
		}
		b.WriteString(line)
	}
	return b.String()
}

// A change is a file as it is and as it must be.
type change struct {
	path     string // on this machine
	mode     fs.FileMode
	was      fs.FileInfo // nil when there was none
	old, new []byte
}

// write carries the plan out below root. Every file is read and understood before
// the first is written.
func (p *plan) write(w io.Writer, root string, now time.Time) error {
	d := machine{root}
	if _, err := d.locate("/"); err != nil {
		return err
	}
	var changes []change
	var errs []error
	for _, f := range p.files {
		c, err := d.plan(f)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		changes = append(changes, c)
	}
	if p.check != nil {
		errs = append(errs, p.check(d)...)
	}
	if len(errs) > 0 {
		return fmt.Errorf("%w\nnothing was written", errors.Join(errs...))
	}
	wrote := false
	for _, c := range changes {
		if c.was != nil && bytes.Equal(c.old, c.new) {
			fmt.Fprintf(w, "unchanged %s\n", c.path)
			continue
		}
		backup, err := c.write(now)
		if err != nil {
			return err
		}
		wrote = true
		if backup != "" {
			fmt.Fprintf(w, "wrote %s (backup %s)\n", c.path, backup)
		} else {
			fmt.Fprintf(w, "wrote %s\n", c.path)
		}
	}
	if wrote {
		p.printRest(w)
	}
	return nil
}

// A machine has the files that are looked at, below root.
type machine struct{ root string }

// locate is where a path of the client is on this machine, symbolic links
// followed: they are kept, and what they lead to is written. None may lead out of
// root.
func (d machine) locate(path string) (string, error) {
	root, err := filepath.EvalSymlinks(d.root)
	if err != nil {
		return "", fmt.Errorf("--root: %w", err)
	}
	if root, err = filepath.Abs(root); err != nil {
		return "", fmt.Errorf("--root: %w", err)
	}
	at, rest := filepath.Join(root, filepath.FromSlash(path)), ""
	for {
		real, err := filepath.EvalSymlinks(at)
		if err == nil {
			real = filepath.Join(real, rest)
			if rel, err := filepath.Rel(root, real); err != nil || rel == ".." || strings.HasPrefix(rel, ".."+string(filepath.Separator)) {
				return "", fmt.Errorf("%s: a symbolic link leads to %s, out of --root", path, real)
			}
			return real, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if _, err := os.Lstat(at); err == nil {
			return "", fmt.Errorf("%s is a symbolic link to nothing", at)
		}
		at, rest = filepath.Dir(at), filepath.Join(filepath.Base(at), rest)
	}
}

// read returns the content of a path of the client, and where it is on this
// machine. What is not there is fs.ErrNotExist.
func (d machine) read(path string) (data []byte, at string, err error) {
	if at, err = d.locate(path); err != nil {
		return nil, "", err
	}
	data, err = os.ReadFile(at)
	return data, at, err
}

// list returns the client's paths of what is in a folder, none if there is no
// such folder.
func (d machine) list(dir string) ([]string, error) {
	at, err := d.locate(dir)
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(at)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var paths []string
	for _, e := range entries {
		paths = append(paths, dir+"/"+e.Name())
	}
	return paths, nil
}

// plan is what f makes of a file.
func (d machine) plan(f file) (change, error) {
	old, at, err := d.read(f.path)
	c := change{path: at, mode: f.mode, old: old}
	switch {
	case err == nil:
		if c.was, err = os.Stat(at); err != nil {
			return c, err
		}
		if old == nil {
			c.old = []byte{} // there is a file, and it is empty
		}
	case !errors.Is(err, fs.ErrNotExist):
		return c, err
	}
	if c.new, err = f.edit(c.old); err != nil {
		return c, fmt.Errorf("%s: %w", at, err)
	}
	return c, nil
}

// write replaces the file at once, or not at all, and returns the name of the
// backup of what was there.
func (c *change) write(now time.Time) (backup string, err error) {
	dir := filepath.Dir(c.path)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if c.was != nil {
		if backup, err = c.backup(now); err != nil {
			return "", fmt.Errorf("backup of %s: %w", c.path, err)
		}
	}
	temp, err := os.CreateTemp(dir, "."+filepath.Base(c.path)+".tidemark-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(temp.Name()) // it is not there any more if all went well
	if err := c.fill(temp, c.new); err != nil {
		return "", err
	}
	if err := os.Rename(temp.Name(), c.path); err != nil {
		return "", err
	}
	return backup, syncDir(dir)
}

// backup copies what was there to a name of its own.
func (c *change) backup(now time.Time) (string, error) {
	base := c.path + ".tidemark-backup-" + now.UTC().Format("20060102T150405Z")
	name := base
	for n := 2; ; n++ {
		f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err == nil {
			return name, c.fill(f, c.old)
		}
		if !errors.Is(err, fs.ErrExist) {
			return "", err
		}
		name = fmt.Sprintf("%s-%d", base, n)
	}
}

// fill writes f to the disk, with the mode and the owner of what was there.
func (c *change) fill(f *os.File, data []byte) error {
	mode := c.mode
	if c.was != nil {
		mode = c.was.Mode().Perm()
	}
	_, err := f.Write(data)
	if err == nil && c.was != nil {
		err = takeOwner(f, c.was)
	}
	if err == nil {
		err = f.Chmod(mode)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// written is the first line of files that are tidemark's alone.
const written = "# Written by tidemark setup, and replaced when it runs again.\n"

// owned is a file that is tidemark's alone. Another's is replaced only by force.
func owned(text string, force bool) func([]byte) ([]byte, error) {
	return func(old []byte) ([]byte, error) {
		if len(bytes.TrimSpace(old)) > 0 && !bytes.HasPrefix(old, []byte(written)) && !force {
			return nil, errors.New("this is somebody else's: it does not begin with the line that tidemark setup writes. --force replaces it, with a backup")
		}
		return []byte(text), nil
	}
}

// replaceCA is a file for the CA of this server alone.
func replaceCA(a *authority) func([]byte) ([]byte, error) {
	return func([]byte) ([]byte, error) { return a.pem, nil }
}

// addCA is a file for the CAs of a host, among which this server's must be.
func addCA(a *authority) func([]byte) ([]byte, error) {
	return func(old []byte) ([]byte, error) {
		if len(bytes.TrimSpace(old)) == 0 {
			return a.pem, nil
		}
		if err := isCertificates(old); err != nil {
			return nil, err
		}
		want := bytes.TrimSpace(a.pem)
		if bytes.Contains(old, want) {
			return old, nil
		}
		updated := bytes.Clone(old)
		if !bytes.HasSuffix(updated, []byte("\n")) {
			updated = append(updated, '\n')
		}
		return append(append(updated, want...), '\n'), nil
	}
}

// isCertificates tells what keeps data from being certificates.
func isCertificates(data []byte) error {
	found := false
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return fmt.Errorf("holds a %s, which is no certificate", strings.ToLower(block.Type))
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return err
		}
		found, data = true, rest
	}
	if !found {
		return errNoCA
	}
	return nil
}
