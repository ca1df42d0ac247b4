# A program of the kind that redraws the whole screen in direct colours: alternate screen, synchronized output, mouse, styles of underline, links.
printf '\033[?1049h\033[?25l\033[?1003;1006h\033[?1004h\033[?2004h\033[>1u\033[22;0t\033]2;true colour ✓\033\\\033]11;rgb:10/20/30\033\\\033]4;3;#abcdef\033\\'
for frame in 1 5; do
	printf '\033[?2026h\033[H'
	for ((y = 0; y < 22; y++)); do
		for ((x = 0; x < 80; x++)); do
			printf '\033[48;2;%d;%d;%dm\033[38;2;%d;%d;%dm▀' $((x * 3)) $((y * 11)) $((frame * 30)) $((255 - x * 3)) $((frame * 20)) $((y * 10))
		done
		printf '\033[m\r\n'
	done
	printf '\033[1;3;4:3;58:2::255:%d:0mframe %d\033[m \033[4:2mdouble\033[4:4mdotted\033[4:5mdashed\033[24m \033[53;9mover and strike\033[m \033]8;id=a;https://example.org/%d\033\\link\033]8;;\033\\\033[K' $((frame * 9)) $frame $frame
	printf '\r\n\033[7;2mdim reverse\033[22;27;5m blink\033[8mhidden\033[m\033[48;5;%dm\033[K\033[m\033[4 q' $((frame + 16))
	printf '\033[?2026l'
done
read -rsn1
printf '\033[3;20r\033[?6h\033[20;1H\n\n\n\033[38:2::1:2:3mscrolled in a region\033[m\033[?6l\033[r'
printf '\033[?1003;1006;1004;2004l\033[<u\033]111\033\\\033]104;3\033\\\033[23;0t\033[?25h\033[0 q\033[?1049l'
printf 'left the screen as it was\r\n'
