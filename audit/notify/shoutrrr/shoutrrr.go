// Package shoutrrr sends through the services that have no sink of their own: Gotify,
// Telegram, Pushover, MQTT and two dozen others, as github.com/nicholas-fedor/shoutrrr
// knows them.
package shoutrrr

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/nicholas-fedor/shoutrrr"
	"github.com/nicholas-fedor/shoutrrr/pkg/router"
	"github.com/nicholas-fedor/shoutrrr/pkg/types"

	"tidemark/audit/notify"
)

// A Sink is one service.
type Sink struct {
	router *router.ServiceRouter
	scheme string
	masked *strings.Replacer
}

// errRedirect is why a redirect is not followed: some of the services take one for done.
var errRedirect = errors.New("redirects are not followed")

// New returns the sink of a service's address, such as gotify://host/token, with or
// without shoutrrr: before it. It asks nobody.
func New(address string) (*Sink, error) {
	address = strings.TrimPrefix(strings.TrimPrefix(address, "shoutrrr://"), "shoutrrr:")
	u, err := url.Parse(address)
	if err != nil || u.Scheme == "" {
		return nil, errors.New("the address cannot be read: want one such as gotify://host/token") // which may hold a secret
	}
	s := &Sink{scheme: u.Scheme, masked: strings.NewReplacer(secrets(address, u)...)}
	client := &http.Client{Timeout: notify.SendTimeout, CheckRedirect: func(*http.Request, []*http.Request) error { return errRedirect }}
	if s.router, err = shoutrrr.CreateSenderWithOptions(types.SenderOptions{HTTPClient: client, Timeout: notify.SendTimeout}, address); err != nil {
		return nil, fmt.Errorf("%s: the address is not one of the service's", s.scheme)
	}
	return s, nil
}

// secretLeast is how many characters of an address may be a secret.
const secretLeast = 4

// secrets are all parts of an address that may be one, each with what is shown instead:
// services put tokens anywhere.
func secrets(address string, u *url.URL) (pairs []string) {
	parts := []string{address, u.Host, u.Hostname(), u.User.Username(), u.Opaque, u.Fragment}
	password, _ := u.User.Password()
	parts = append(parts, password)
	parts = append(parts, strings.FieldsFunc(u.Path, func(r rune) bool { return r == '/' || r == ':' || r == '@' })...)
	for _, values := range u.Query() {
		for _, v := range values {
			parts = append(append(parts, v), strings.Split(v, ",")...)
		}
	}
	for _, p := range slices.Clone(parts) {
		parts = append(parts, url.QueryEscape(p), url.PathEscape(p))
	}
	slices.SortFunc(parts, func(a, b string) int { return len(b) - len(a) }) // the whole before its parts
	for _, p := range slices.Compact(parts) {
		if len(p) >= secretLeast {
			pairs = append(pairs, p, "(masked)")
		}
	}
	return pairs
}

var statusShape = regexp.MustCompile(`\b[345][0-9]{2}\b`)

// why is what can be told of an error. What the services say has addresses in it, and these
// have secrets in them that are not as they were written: only what the network says, and
// the status of an answer, is told.
func (s *Sink) why(err error) string {
	var ue *url.Error
	if errors.As(err, &ue) {
		return s.masked.Replace(ue.Err.Error())
	}
	if status := statusShape.FindString(s.masked.Replace(err.Error())); status != "" {
		return "it was not taken: " + status
	}
	return "it was not taken"
}

// textMost is what is sent in bytes: what of the services takes least, Pushover, takes
// 1024 characters.
const textMost = 1000

// Send implements notify.Sink. The services know nothing of ctx: one that hangs is left
// to its own time-out, which is notify.SendTimeout.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	params := types.Params{}
	params.SetTitle(notify.Clip(m.Title(), 200))
	done := make(chan []error, 1)
	go func() { done <- s.router.Send(notify.Clip(m.Text(), textMost), &params) }()
	select {
	case errs := <-done:
		if err := errors.Join(errs...); err != nil {
			return &notify.Failure{Err: fmt.Errorf("%s: %s", s.scheme, s.why(err))}
		}
		return nil
	case <-ctx.Done():
		return &notify.Failure{Err: fmt.Errorf("%s: %w", s.scheme, context.Cause(ctx))}
	}
}
