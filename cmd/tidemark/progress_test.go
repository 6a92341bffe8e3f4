package main

import (
	"bytes"
	"io"
	"strings"
	"sync"
	"testing"
)

// What is no terminal gets a line when a thing ends, and nothing that moves a cursor,
// also not by the name of a thing or by what became of it.
func TestProgressInPlainLines(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out)
	p.update("docker.io/library/app:1", 0, 0)
	p.update("docker.io/library/app:1", 1<<20, 2<<20)
	p.update("docker.io/library/gone:1", 0, 0)
	p.end("docker.io/library/app:1", "fetched 2 MiB")
	p.end("docker.io/library/gone:1", "upstream says\r\x1b[2J404")
	p.Close()
	p.Close()
	want := "docker.io/library/app:1  fetched 2 MiB\n" +
		`docker.io/library/gone:1  "upstream says\r\x1b[2J404"` + "\n"
	if out.String() != want {
		t.Errorf("got\n%q\nwant\n%q", out.String(), want)
	}
}

// Several goroutines tell of their things, each of which has a line of its own.
func TestProgressOfSeveralAtATime(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			p.update("app", 1, 2)
			p.end("app", "done")
		})
	}
	wg.Wait()
	p.Close()
	if want := strings.Repeat("app  done\n", 20); out.String() != want {
		t.Errorf("got\n%q\nwant\n%q", out.String(), want)
	}
}

// A transfer hands on what it reads, counts it, and says nothing where there is no
// terminal.
func TestTransferCountsWhatIsRead(t *testing.T) {
	var out bytes.Buffer
	tr := newTransfer(&out, "export", 0)
	got, err := io.ReadAll(tr.Reader(strings.NewReader("a bundle")))
	tr.Close()
	if err != nil || string(got) != "a bundle" || tr.done != 8 || out.Len() != 0 {
		t.Errorf("read %q, %v; counted %d; said %q", got, err, tr.done, out.String())
	}
}
