package upstream

import (
	"context"
	"errors"
	"io"
	"net/http"
	"time"
)

// errStalled is the cause of a body that stopped arriving.
var errStalled = errors.New("upstream stopped sending")

// An idleTransport ends a request whose body stops arriving, whatever the
// answer is, so that an upstream that stalls is an error and not a client that
// waits for ever.
type idleTransport struct {
	http.RoundTripper
	idle time.Duration
}

func (t idleTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	resp, err := t.RoundTripper.RoundTrip(req.WithContext(ctx))
	if err != nil {
		cancel(nil)
		return nil, err
	}
	b := &idleBody{ReadCloser: resp.Body, ctx: ctx, cancel: cancel, idle: t.idle}
	b.timer = time.AfterFunc(t.idle, func() { cancel(errStalled) })
	b.timer.Stop() // until someone waits
	resp.Body = b
	return resp, nil
}

// An idleBody is the body of one response. Time counts only while a reader
// waits: what it does between reads is not upstream's fault.
type idleBody struct {
	io.ReadCloser
	ctx    context.Context // of the request that this is the answer to
	cancel context.CancelCauseFunc
	idle   time.Duration
	timer  *time.Timer
}

func (b *idleBody) Read(p []byte) (int, error) {
	b.timer.Reset(b.idle)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	if err != nil && err != io.EOF && context.Cause(b.ctx) == errStalled {
		err = errStalled
	}
	return n, err
}

func (b *idleBody) Close() error {
	b.timer.Stop()
	err := b.ReadCloser.Close()
	b.cancel(nil)
	return err
}
