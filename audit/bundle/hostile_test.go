package bundle_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"tidemark/audit/bundle"
)

// An entry of a tar that somebody else made.
type entry struct {
	tar.Header
	body []byte
}

// unpack reads a bundle as any tar.
func unpack(t testing.TB, packed []byte) (entries []entry) {
	t.Helper()
	tr := tar.NewReader(bytes.NewReader(packed))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, entry{tar.Header{Typeflag: tar.TypeReg, Name: h.Name, Size: h.Size, Mode: h.Mode, ModTime: h.ModTime}, body})
	}
}

// repack writes entries as archive/tar does.
func repack(t testing.TB, entries []entry) []byte {
	t.Helper()
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	for _, e := range entries {
		e.Size = int64(len(e.body))
		if err := tw.WriteHeader(&e.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func file(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, []byte(body)}
}

// What tars can do that a bundle does not is refused, wherever it is in one, with the
// name of what was expected there. Nothing that is not listed is ever handed out.
func TestHostileTarsAreRefused(t *testing.T) {
	packed, _ := pack(t, newWorld().full)
	good := unpack(t, packed)
	if again := repack(t, good); !bytes.Equal(again, packed) {
		t.Fatal("a bundle is not what archive/tar makes of its entries")
	}
	blob := slices.IndexFunc(good, func(e entry) bool { return strings.HasPrefix(e.Name, "blobs/") })
	expected := func(i int) string {
		if i == len(good) {
			return "the end of the bundle"
		}
		return good[i].Name
	}
	link := func(kind byte, name, to string) entry {
		return entry{tar.Header{Typeflag: kind, Name: name, Linkname: to, Mode: 0o777}, nil}
	}
	inserted := map[string]entry{
		"a path that leads out":       file("../../outside", "x"),
		"a path from the root":        file("/etc/passwd", "x"),
		"a path that leads out later": file("blobs/sha256/../../../outside", "x"),
		"a path of Windows":           file(`..\outside`, "x"),
		"a symbolic link":             link(tar.TypeSymlink, "blobs/sha256", "/etc"),
		"a hard link":                 link(tar.TypeLink, "blobs/sha256/x", "/etc/passwd"),
		"a folder":                    {tar.Header{Typeflag: tar.TypeDir, Name: "blobs/", Mode: 0o755}, nil},
		"a device":                    {tar.Header{Typeflag: tar.TypeChar, Name: "blobs/null", Devmajor: 1, Devminor: 3}, nil},
		"a FIFO":                      {tar.Header{Typeflag: tar.TypeFifo, Name: "blobs/fifo"}, nil},
		"a file that is not listed":   file("blobs/sha256/"+strings.Repeat("a", 64), "x"),
		"a name that is twice there":  file(good[0].Name, string(good[0].body)),
		"a name without end":          file(strings.Repeat("a/", 2000)+"a", "x"),
		"a long name of GNU":          {tar.Header{Typeflag: tar.TypeReg, Name: strings.Repeat("a/", 2000) + "a", Format: tar.FormatGNU}, nil},
		"records without end": {tar.Header{Typeflag: tar.TypeReg, Name: "x", PAXRecords: map[string]string{
			"TIDEMARK.x": strings.Repeat("x", 1<<19)}, Format: tar.FormatPAX}, nil},
		"records for everything": {tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"path": "../outside"}}, nil},
	}
	for name, bad := range inserted {
		for _, at := range []int{0, 2, blob, len(good)} {
			where := expected(at)
			if bad.Name == where {
				where = expected(at + 1) // it is too early once, and then too often
			}
			check(t, name, where, repack(t, slices.Insert(slices.Clone(good), at, bad)))
		}
		check(t, name+" instead", expected(blob), repack(t, append(append(slices.Clone(good[:blob]), bad), good[blob+1:]...)))
	}
	for i := range good {
		check(t, "without "+good[i].Name, good[i].Name, repack(t, slices.Delete(slices.Clone(good), i, i+1)))
		if i > 0 {
			swapped := slices.Clone(good)
			swapped[i-1], swapped[i] = swapped[i], swapped[i-1]
			check(t, good[i].Name+" too early", good[i-1].Name, repack(t, swapped))
		}
		owned := slices.Clone(good)
		owned[i].Uid, owned[i].Mode = 1000, 0o4755
		check(t, good[i].Name+" with an owner", good[i].Name, repack(t, owned))
		longer := slices.Clone(good)
		longer[i].body = append(slices.Clone(longer[i].body), 'x')
		where := good[i].Name
		if where == "tidemark/contents.json" {
			where = "tidemark/contents.sig" // which signs another list
		}
		check(t, good[i].Name+" with a byte more", where, repack(t, longer))
	}
	sparse := bytes.Clone(packed)
	for i := range good {
		at := bytes.LastIndex(sparse, []byte(good[i].Name[:min(len(good[i].Name), 100)])) // where it is longer, of what follows its PAX header
		sparse[at+156] = tar.TypeGNUSparse
		check(t, good[i].Name+" sparse", good[i].Name, sparse)
		sparse[at+156] = tar.TypeReg
	}
	for _, size := range []string{"77777777777\x00", "-0000000001\x00", "           \x00", "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"} {
		for _, name := range []string{good[1].Name, good[2].Name, good[blob].Name} {
			b := bytes.Clone(packed)
			h := b[bytes.Index(b, append([]byte(name), 0)):][:block]
			copy(h[124:], size)
			sign(h)
			check(t, fmt.Sprintf("%s of %q bytes", name, size), name, b)
		}
	}
	check(t, "something after the end", expected(len(good)), append(bytes.Clone(packed), 0))
	check(t, "another bundle after the end", expected(len(good)), append(bytes.Clone(packed), packed...))
	check(t, "nothing", good[0].Name, nil)
	check(t, "zeros", good[0].Name, make([]byte, 10_240))
	var zipped bytes.Buffer
	zw := gzip.NewWriter(&zipped)
	if _, err := zw.Write(packed); err != nil {
		t.Fatal(err)
	}
	if err := zw.Close(); err != nil {
		t.Fatal(err)
	}
	check(t, "compressed", good[0].Name, zipped.Bytes())
}

// sign writes the checksum of a header.
func sign(h []byte) {
	copy(h[148:156], "        ")
	sum := 0
	for _, b := range h {
		sum += int(b)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

// check wants a bundle to be refused for what is where, and nothing handed out that
// is not in the list.
func check(t *testing.T, name, where string, b []byte) {
	t.Helper()
	cs := checks()
	listed := make(map[bundle.Blob]bool)
	cs.Begin = func(c bundle.Contents) error {
		for _, blob := range slices.Concat(c.Manifests, c.Blobs) {
			listed[blob] = true
		}
		return nil
	}
	cs.Content = func(_ context.Context, blob bundle.Blob, r io.Reader) error {
		if !listed[blob] {
			t.Errorf("%s: %v was handed out", name, blob)
		}
		_, err := io.Copy(io.Discard, r)
		return err
	}
	_, err := bundle.Read(t.Context(), bytes.NewReader(b), cs)
	var wrong *bundle.WrongError
	if !errors.As(err, &wrong) || wrong.Entry != where {
		t.Errorf("%s: %v; want a WrongError about %s", name, err, where)
	}
}
