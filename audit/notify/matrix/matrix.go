// Package matrix sends notices to a room of Matrix (Client-Server API,
// "PUT /_matrix/client/v3/rooms/{roomId}/send/{eventType}/{txnId}").
package matrix

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"

	"tidemark/audit/notify"
)

// A Sink is a room. The homeserver knows a message by its ID: one that is sent again
// is in the room once.
type Sink struct {
	post        *notify.Poster
	room, token string
}

// New returns the sink at a homeserver's address for a room's ID, such as
// !abc:example.org, in which the user of the access token is.
func New(address, room, token string) (*Sink, error) {
	post, err := notify.NewPoster(address)
	return &Sink{post, room, strings.TrimSpace(token)}, err
}

// textMost keeps an event below the 64 KiB that Matrix takes.
const textMost = 32_000

// Send implements notify.Sink.
func (s *Sink) Send(ctx context.Context, m notify.Message) error {
	body, err := json.Marshal(struct {
		Type string `json:"msgtype"`
		Body string `json:"body"`
	}{"m.notice", m.Title() + "\n\n" + notify.Clip(m.Text(), textMost)})
	if err != nil {
		return err
	}
	head := http.Header{"Content-Type": {"application/json"}, "Authorization": {"Bearer " + s.token}}
	return s.post.Put(ctx, head, body, "_matrix/client/v3/rooms", url.PathEscape(s.room), "send/m.room.message", url.PathEscape(m.ID))
}
