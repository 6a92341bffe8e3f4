package front

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/rs/zerolog"
	"golang.org/x/crypto/bcrypt"
)

// Htpasswd are users and their passwords in a file of Apache's htpasswd, with
// bcrypt hashes. The file is read again when it has changed; while it cannot be,
// those read before are used.
type Htpasswd struct {
	path string
	log  zerolog.Logger
	key  [32]byte      // of the hashes in checked
	busy chan struct{} // holds one for each password that is compared: they must not take all processors

	mu      sync.Mutex
	users   map[string][]byte // bcrypt hashes
	anyone  []byte            // the one that takes longest
	stamp   time.Time         // modification time of what users was read from
	looked  time.Time
	checked map[string][sha256.Size]byte // passwords that matched, by user, hashed
}

// OpenHtpasswd reads the users in a file.
func OpenHtpasswd(path string, log zerolog.Logger) (*Htpasswd, error) {
	h := &Htpasswd{path: path, log: log, busy: make(chan struct{}, max(1, runtime.NumCPU()/2))}
	_, _ = rand.Read(h.key[:]) // never fails
	if err := h.load(); err != nil {
		return nil, err
	}
	return h, nil
}

// load reads the file. h.mu is held, or h is not shared yet.
func (h *Htpasswd) load() error {
	info, err := os.Stat(h.path)
	if err != nil {
		return fmt.Errorf("htpasswd: %w", err)
	}
	data, err := os.ReadFile(h.path)
	if err != nil {
		return fmt.Errorf("htpasswd: %w", err)
	}
	users, err := parseHtpasswd(data)
	if err != nil {
		return fmt.Errorf("htpasswd %s: %w", h.path, err)
	}
	h.users, h.stamp = users, info.ModTime()
	h.anyone = nil
	for _, hash := range users {
		if h.anyone == nil || costOf(hash) > costOf(h.anyone) {
			h.anyone = hash
		}
	}
	h.checked = make(map[string][sha256.Size]byte)
	return nil
}

const (
	bcryptLen   = 60 // bytes of a hash
	passwordLen = 72 // bytes of a password that bcrypt looks at: longer ones would match in part
)

func costOf(hash []byte) int {
	cost, err := bcrypt.Cost(hash)
	if err != nil {
		panic("front: a hash that was read is none: " + err.Error())
	}
	return cost
}

// parseHtpasswd reads lines of user:hash. What it refuses it does not repeat: a
// line may be a password in the wrong place.
func parseHtpasswd(data []byte) (map[string][]byte, error) {
	users := make(map[string][]byte)
	n := 0
	for text := range strings.Lines(string(data)) {
		n++
		line := strings.TrimSpace(text)
		if line == "" || line[0] == '#' {
			continue
		}
		user, hash, ok := strings.Cut(line, ":")
		if !ok || user == "" {
			return nil, fmt.Errorf("line %d is not user:hash", n)
		}
		if _, err := bcrypt.Cost([]byte(hash)); err != nil || len(hash) != bcryptLen {
			return nil, fmt.Errorf("line %d: the hash of %.100q is not bcrypt; make it with htpasswd -B", n, user)
		}
		if _, twice := users[user]; twice {
			return nil, fmt.Errorf("line %d: %.100q stands there twice", n, user)
		}
		users[user] = []byte(hash)
	}
	if len(users) == 0 {
		return nil, errors.New("there is no user in it")
	}
	return users, nil
}

// Allows tells whether a user has this password. bcrypt takes a while, on purpose,
// and a pull has many requests: what matched is remembered, hashed, until the file
// changes.
func (h *Htpasswd) Allows(user, password string) bool {
	if len(password) > passwordLen {
		return false
	}
	m := hmac.New(sha256.New, h.key[:])
	m.Write([]byte(password))
	sum := [sha256.Size]byte(m.Sum(nil))
	h.mu.Lock()
	h.follow()
	hash, known := h.users[user]
	if !known {
		hash = h.anyone // so that it takes the time that a wrong password takes
	}
	was, ok := h.checked[user]
	stamp := h.stamp
	h.mu.Unlock()
	if ok && hmac.Equal(was[:], sum[:]) {
		return true
	}
	h.busy <- struct{}{}
	err := bcrypt.CompareHashAndPassword(hash, []byte(password))
	<-h.busy
	if err != nil || !known {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stamp.Equal(stamp) {
		h.checked[user] = sum
	}
	return true
}

// follow reads the file again if it has changed. h.mu is held.
func (h *Htpasswd) follow() {
	now := time.Now()
	if now.Sub(h.looked) < fileCheck {
		return
	}
	h.looked = now
	info, err := os.Stat(h.path)
	if err == nil && info.ModTime().Equal(h.stamp) {
		return
	}
	if err == nil {
		err = h.load()
	}
	if err != nil {
		h.log.Warn().Err(err).Msg("the users could not be read again; those from before may enter")
	}
}
