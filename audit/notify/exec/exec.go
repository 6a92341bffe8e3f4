// Package exec calls a program for every message, with the events on its standard
// input and what they say in its environment. No shell is involved.
package exec

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// A Sink is a program and its arguments.
type Sink struct{ command []string }

// New returns the sink that calls a program.
func New(command []string) (*Sink, error) {
	if len(command) == 0 {
		return nil, errors.New("no program to call")
	}
	return &Sink{command}, nil
}

// waitDelay is what a program that was told to end is given.
const waitDelay = 2 * time.Second

// Send implements notify.Sink. The program has taken the message when it exits with 0.
// It gets one CloudEvent a line.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	var in bytes.Buffer
	for _, i := range m.Items {
		line, err := json.Marshal(i.CloudEvent(m.Origin))
		if err != nil {
			return err
		}
		in.Write(append(line, '\n'))
	}
	first := m.Items[0].Event
	// Of our own environment, which may hold secrets, what a program needs to run.
	env := []string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "LANG=" + os.Getenv("LANG"),
		"TIDEMARK_ID=" + m.ID, "TIDEMARK_TITLE=" + m.Title(), "TIDEMARK_SEVERITY=" + m.Severity().String(),
		"TIDEMARK_TYPE=" + string(first.Type), fmt.Sprintf("TIDEMARK_EVENTS=%d", len(m.Items)), fmt.Sprintf("TIDEMARK_INDEX=%d", m.Items[0].Index),
	}
	if first.Ref != (audit.Ref{}) {
		env = append(env, "TIDEMARK_REF="+first.Ref.String())
	}
	if first.Old != nil {
		env = append(env, "TIDEMARK_OLD="+first.Old.Digest.String())
	}
	if first.New != nil {
		env = append(env, "TIDEMARK_NEW="+first.New.Digest.String())
	}
	cmd := exec.CommandContext(ctx, s.command[0], s.command[1:]...)
	cmd.Stdin, cmd.Env, cmd.WaitDelay = &in, env, waitDelay
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", s.command[0], err, strings.TrimSpace(notify.Clip(string(out), 200)))
	}
	return nil
}
