/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package registry

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/stretchr/testify/require"
)

func start(t *testing.T, o ...Option) (*Registry, v1.Image, string) {
	t.Helper()
	r, err := Start(o...)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Close()) })
	img, err := random.Image(10<<10, 3)
	require.NoError(t, err)
	ref, err := r.Push("dir/app:1", img)
	require.NoError(t, err)
	return r, img, ref
}

// pull reads all of an image, with some client's User-Agent.
func pull(t *testing.T, ref string, o ...remote.Option) error {
	t.Helper()
	parsed, err := name.ParseReference(ref)
	require.NoError(t, err)
	img, err := remote.Image(parsed, o...)
	if err != nil {
		return err
	}
	if _, err := img.RawConfigFile(); err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	for _, l := range layers {
		rc, err := l.Compressed()
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, rc); err != nil {
			return err
		}
	}
	return nil
}

// The log is the judge of all other tests: it has to tell host from guest and
// layers from the rest, count what it sends, and know nothing of a push.
func TestLog(t *testing.T) {
	r, img, ref := start(t)
	require.Empty(t, r.Log(), "a push is not a request")
	require.NoError(t, pull(t, ref, remote.WithUserAgent(GuestUserAgent+"/1")))
	m, err := img.Manifest()
	require.NoError(t, err)
	var layers []string
	var size int64
	for _, l := range m.Layers {
		layers = append(layers, l.Digest.String())
		size += l.Size
	}
	require.Empty(t, r.Log().By(Host))
	guest := r.Log().By(Guest).In("dir/app").OK()
	require.ElementsMatch(t, layers, guest.Of(Layer).References())
	require.Equal(t, size, guest.Of(Layer).Bytes())
	require.Equal(t, []string{m.Config.Digest.String()}, guest.Of(Config).References())
	require.Equal(t, []string{"1"}, guest.Of(Manifest).References())

	r.Reset()
	require.NoError(t, pull(t, ref))
	require.Empty(t, r.Log().By(Guest))
	require.ElementsMatch(t, layers, r.Log().By(Host).Of(Layer).References(), "an unknown client is the host")

	// A digest that no manifest names could be a layer, so it counts as one.
	r.Reset()
	resp, err := http.Head(r.URL() + "/v2/dir/app/blobs/sha256:" + strings.Repeat("a", 64))
	require.NoError(t, err)
	resp.Body.Close()
	require.Len(t, r.Log().Of(Layer), 1)
	require.Equal(t, http.StatusNotFound, r.Log()[0].Status)
	require.Empty(t, r.Log().OK())
}

// Clients resume a download with an open range.
func TestRange(t *testing.T) {
	r, img, _ := start(t)
	m, err := img.Manifest()
	require.NoError(t, err)
	req, err := http.NewRequest(http.MethodGet, r.URL()+"/v2/dir/app/blobs/"+m.Layers[0].Digest.String(), nil)
	require.NoError(t, err)
	req.Header.Set("Range", "bytes=100-")
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	require.Equal(t, http.StatusPartialContent, resp.StatusCode)
	n, err := io.Copy(io.Discard, resp.Body)
	require.NoError(t, err)
	require.Equal(t, m.Layers[0].Size-100, n)
}

func TestAuth(t *testing.T) {
	const user, password = "user", "p:a ss%/ä"
	for scheme, option := range map[string]Option{
		"basic": WithBasicAuth(user, password),
		"token": WithTokenAuth(user, password),
	} {
		t.Run(scheme, func(t *testing.T) {
			r, _, ref := start(t, option)
			right := remote.WithAuth(&authn.Basic{Username: user, Password: password})
			require.NoError(t, pull(t, ref, right))
			require.NotEmpty(t, r.Log().Of(Layer).OK())
			require.True(t, r.Log().Of(Layer)[0].Authorization)
			require.NotContains(t, r.Log().String(), password)

			r.Reset()
			require.ErrorContains(t, pull(t, ref), "UNAUTHORIZED")
			require.Error(t, pull(t, ref, remote.WithAuth(&authn.Basic{Username: user, Password: "wrong"})))
			require.Empty(t, r.Log().Of(Manifest, Layer, Config).OK())
		})
	}
}

func TestTLS(t *testing.T) {
	r, _, ref := start(t, WithTLS())
	require.Error(t, pull(t, ref), "nobody trusts the registry's authority by default")
	pool := x509.NewCertPool()
	require.True(t, pool.AppendCertsFromPEM(r.CA()))
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}}}
	resp, err := client.Get(r.URL() + "/v2/")
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, http.StatusOK, resp.StatusCode)
}

// Each fault is seen by a client as what it says, meets only what it is for, as
// often as it is told, and goes away.
func TestFaults(t *testing.T) {
	r, img, _ := start(t)
	m, err := img.Manifest()
	require.NoError(t, err)
	digest := m.Layers[0].Digest.String()
	get := func(kind string) (*http.Response, []byte, error) {
		client := &http.Client{Timeout: 500 * time.Millisecond, Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get(r.URL() + "/v2/dir/app/" + kind)
		if err != nil {
			return nil, nil, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return resp, b, err
	}
	_, right, err := get("blobs/" + digest)
	require.NoError(t, err)

	for name, c := range map[string]struct {
		do    Action
		check func(*http.Response, []byte, error)
	}{
		"status": {Status(http.StatusServiceUnavailable), func(resp *http.Response, _ []byte, err error) {
			require.NoError(t, err)
			require.Equal(t, http.StatusServiceUnavailable, resp.StatusCode)
		}},
		"delay": {Delay(50 * time.Millisecond), func(_ *http.Response, b []byte, err error) {
			require.NoError(t, err)
			require.Equal(t, right, b)
		}},
		"slow": {Slow(len(right)/2, 50*time.Millisecond), func(_ *http.Response, b []byte, err error) {
			require.NoError(t, err)
			require.Equal(t, right, b)
		}},
		"hang":  {Hang(), func(_ *http.Response, _ []byte, err error) { require.ErrorContains(t, err, "Timeout") }},
		"reset": {Reset(), func(_ *http.Response, _ []byte, err error) { require.ErrorContains(t, err, "reset by peer") }},
		"truncate": {Truncate(10), func(_ *http.Response, b []byte, err error) {
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
			require.Equal(t, right[:10], b)
		}},
		"corrupt": {Corrupt(), func(_ *http.Response, b []byte, err error) {
			require.NoError(t, err)
			require.Len(t, b, len(right))
			require.False(t, bytes.Equal(right, b))
		}},
		"wrong digest": {WrongDigest(), func(resp *http.Response, b []byte, err error) {
			require.NoError(t, err)
			require.Equal(t, right, b)
			require.NotEqual(t, digest, resp.Header.Get("Docker-Content-Digest"))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			remove := r.Inject(Fault{Match: Kinds(Layer), Do: c.do, Times: 1})
			_, _, err := get("manifests/1")
			require.NoError(t, err)
			c.check(get("blobs/" + digest))
			resp, b, err := get("blobs/" + digest)
			require.NoError(t, err)
			require.Equal(t, http.StatusOK, resp.StatusCode)
			require.Equal(t, right, b)
			remove()
		})
	}

	remove := r.Inject(Fault{Do: Status(http.StatusTeapot)})
	resp, _, err := get("blobs/" + digest)
	require.NoError(t, err)
	require.Equal(t, http.StatusTeapot, resp.StatusCode)
	remove()
	resp, _, err = get("blobs/" + digest)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, resp.StatusCode)
}
