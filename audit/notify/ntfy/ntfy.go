// Package ntfy publishes to a topic of ntfy.
package ntfy

import (
	"context"
	"mime"
	"net/http"
	"strconv"
	"strings"

	"tidemark/audit"
	"tidemark/audit/notify"
)

// A Sink is a topic.
type Sink struct {
	post  *notify.Poster
	token string
}

// New returns the sink at the address of a topic. token is an access token, or "".
func New(address, token string) (*Sink, error) {
	post, err := notify.NewPoster(address)
	return &Sink{post, strings.TrimSpace(token)}, err
}

// textMost is what a message takes in bytes; more becomes an attachment.
const textMost = 4000

var priorities = map[audit.Severity]int{audit.Info: 2, audit.Notice: 3, audit.Warning: 4, audit.High: 4, audit.Critical: 5}

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	head := http.Header{
		"Title": {mime.QEncoding.Encode("utf-8", m.Title())}, "Priority": {strconv.Itoa(priorities[m.Severity()])}, "Tags": {"tidemark," + m.Severity().String()},
	}
	if s.token != "" {
		head.Set("Authorization", "Bearer "+s.token)
	}
	return s.post.Post(ctx, head, []byte(notify.Clip(m.Text(), textMost)))
}
