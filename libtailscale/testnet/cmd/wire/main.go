// Command wire makes two TUN devices, joins them, and delays every packet: a long path
// on one machine, without loss. It needs root.
//
//	wire NAME NAME DELAY
//
// It writes "ready" once the devices are there, and runs until it is killed.
package main

import (
	"fmt"
	"log"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxPacket is more than the MTU of a TUN device.
	maxPacket = 2048
	// maxQueued is how many packets may be under way in each direction: 100 ms at 10 Gb/s.
	maxQueued = 100_000
)

func main() {
	log.SetFlags(0)
	log.SetPrefix("wire: ")
	if len(os.Args) != 4 {
		log.Fatal("usage: wire NAME NAME DELAY")
	}
	delay, err := time.ParseDuration(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	here, there := openTUN(os.Args[1]), openTUN(os.Args[2])
	fmt.Println("ready")
	go carry(here, there, delay)
	carry(there, here, delay)
}

// openTUN makes a TUN device that lives as long as this process.
func openTUN(name string) *os.File {
	request, err := unix.NewIfreq(name)
	if err != nil {
		log.Fatalf("%s: %v", name, err)
	}
	// In blocking mode, since the poller refuses the device until it is attached.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		log.Fatalf("/dev/net/tun: %v", err)
	}
	request.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		log.Fatalf("%s: %v", name, err)
	}
	return os.NewFile(uintptr(fd), name)
}

// packet is one that is under way.
type packet struct {
	due   time.Time
	bytes []byte
}

// carry passes packets on, each after the delay. It drops packets beyond maxQueued.
func carry(from, to *os.File, delay time.Duration) {
	queue := make(chan packet, maxQueued)
	go func() {
		for p := range queue {
			time.Sleep(time.Until(p.due))
			to.Write(p.bytes) // fails while the device is down
		}
	}()
	buf := make([]byte, maxPacket)
	for {
		n, err := from.Read(buf)
		if err != nil {
			log.Fatalf("%s: %v", from.Name(), err)
		}
		select {
		case queue <- packet{time.Now().Add(delay), append([]byte(nil), buf[:n]...)}:
		default:
		}
	}
}
