// Package jsonl writes events as JSON lines, CloudEvents each, to a file or to
// standard output.
package jsonl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"sync"

	"tidemark/audit/notify"
)

// A Sink is a file that grows, or a stream.
type Sink struct {
	path string

	mu  sync.Mutex
	out io.Writer // nil for the file
}

// New returns the sink that appends to the file path. It is opened for each message, so
// that it can be moved away, and synced: what was told survives a power cut.
func New(path string) *Sink { return &Sink{path: path} }

// To returns the sink that writes to w.
func To(w io.Writer) *Sink { return &Sink{out: w} }

// Send implements notify.Sink. A message that was cut off is written again as a whole,
// behind what there is of it.
func (s *Sink) Send(_ context.Context, m notify.Message) (err error) {
	var lines bytes.Buffer
	for _, i := range m.Items {
		line, err := json.Marshal(i.CloudEvent(m.Origin))
		if err != nil {
			return err
		}
		lines.Write(append(line, '\n'))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.out != nil {
		_, err := s.out.Write(lines.Bytes())
		return err
	}
	f, err := os.OpenFile(s.path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(lines.Bytes()); err != nil {
		return err
	}
	return f.Sync()
}
